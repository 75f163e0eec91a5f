// A guest without an operating system that writes to a disk: 32-bit code of a multiboot image, which
// runs anywhere. It polls; its interrupts, by MSI-X, get as far as the local APIC and are never taken.
//
// In each generation, from 1 on, it writes 8 blocks of 4 KiB with a request each, all at once, waits for
// them, flushes, waits, and says so. It prints w before it rings for the writes, s when they are
// complete, F and the generation when the flush is. Anything unexpected is a capital letter and the end.

.section .rodata.hv_test_disk_writer, "a", @progbits
.globl hv_test_disk_writer
.globl hv_test_disk_writer_end
.hidden hv_test_disk_writer
.hidden hv_test_disk_writer_end
hv_test_disk_writer:
.code32
    mov ebp, 0xffffffff             // the last generation; the test changes it
    mov esp, 0x1f0000
    cld

    mov ebx, 0x80000800             // configuration address of slot 1
1:  mov eax, ebx
    mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    in eax, dx
    cmp eax, 0x10421af4             // a modern block device
    je 2f
    add ebx, 0x800
    cmp ebx, 0x80010000
    jb 1b
    mov al, 'N'
    jmp hv_test_disk_fail

2:  mov ecx, 0x18                   // BAR 2, the registers: where 32 bits reach
    mov eax, {registers}
    call hv_test_disk_pci_write
    mov ecx, 0x1c
    xor eax, eax
    call hv_test_disk_pci_write
    mov ecx, 0x04                   // memory space, bus master
    mov eax, 6
    call hv_test_disk_pci_write

    mov dword ptr [0xfee000f0], 0x1ff // the local APIC is on
    mov ecx, 0x10                   // BAR 0, where the machine has put it: the message of vector 0
    call hv_test_disk_pci_read
    and eax, 0xfffffff0
    mov dword ptr [eax], 0xfee00000
    mov dword ptr [eax + 4], 0
    mov dword ptr [eax + 8], 0x41
    mov dword ptr [eax + 12], 0
    mov ecx, 0x34                   // the capabilities
    call hv_test_disk_pci_read
    movzx ecx, al
1:  call hv_test_disk_pci_read
    cmp al, 0x11                    // MSI-X
    je 2f
    movzx ecx, ah
    test ecx, ecx
    jnz 1b
    mov al, 'M'
    jmp hv_test_disk_fail
2:  or eax, 0x80000000              // enabled
    call hv_test_disk_pci_write

    mov edi, {registers}
    mov byte ptr [edi + 20], 0      // device_status: reset
3:  cmp byte ptr [edi + 20], 0
    jne 3b
    mov byte ptr [edi + 20], 1
    mov byte ptr [edi + 20], 3
    mov dword ptr [edi + 8], 0      // VIRTIO_BLK_F_FLUSH
    mov dword ptr [edi + 12], 0x200
    mov dword ptr [edi + 8], 1      // VIRTIO_F_VERSION_1
    mov dword ptr [edi + 12], 1
    mov byte ptr [edi + 20], 11
    test byte ptr [edi + 20], 8
    mov al, 'X'
    jz hv_test_disk_fail
    mov word ptr [edi + 22], 0
    mov word ptr [edi + 24], 64
    mov dword ptr [edi + 32], 0x200000
    mov dword ptr [edi + 36], 0
    mov dword ptr [edi + 40], 0x201000
    mov dword ptr [edi + 44], 0
    mov dword ptr [edi + 48], 0x202000
    mov dword ptr [edi + 52], 0
    mov word ptr [edi + 26], 0      // vector 0
    mov word ptr [edi + 28], 1
    mov byte ptr [edi + 20], 15
    mov word ptr [0x201000], 0      // interrupts are wanted

    // Descriptors 3j to 3j + 2 are those of write j: header, block, status.
    mov edi, 0x200000
    xor ecx, ecx
4:  mov eax, ecx
    shl eax, 4
    add eax, 0x203000
    mov [edi], eax
    mov dword ptr [edi + 8], 16
    lea eax, [ecx + ecx * 2 + 1]
    shl eax, 16
    or eax, 1                       // NEXT
    mov [edi + 12], eax
    mov eax, ecx
    shl eax, 12
    add eax, 0x210000
    mov [edi + 16], eax
    mov dword ptr [edi + 24], 4096
    lea eax, [ecx + ecx * 2 + 2]
    shl eax, 16
    or eax, 1
    mov [edi + 28], eax
    lea eax, [ecx + 0x203800]
    mov [edi + 32], eax
    mov dword ptr [edi + 40], 1
    mov dword ptr [edi + 44], 2     // WRITE
    add edi, 48
    inc ecx
    cmp ecx, 8
    jb 4b
    // 24 and 25 are those of the flush.
    mov dword ptr [edi], 0x203080
    mov dword ptr [edi + 8], 16
    mov dword ptr [edi + 12], 25 << 16 | 1
    mov dword ptr [edi + 16], 0x203808
    mov dword ptr [edi + 24], 1
    mov dword ptr [edi + 28], 2
    mov dword ptr [0x203080], 4     // VIRTIO_BLK_T_FLUSH

    mov esi, 1                      // the generation
hv_test_disk_generation:
    push ebp
    xor ebp, ebp                    // the write
5:  mov edi, ebp
    shl edi, 12
    add edi, 0x210000
    mov dword ptr [edi], {magic}
    lea eax, [esi * 8]
    add eax, ebp
    mov edx, eax                    // the seed
    and eax, {blocks} - 1
    mov [edi + 4], eax
    mov [edi + 8], esi
    mov ebx, {magic}
    add ebx, eax
    add ebx, esi
    shl eax, 3                      // the sector
    mov ecx, ebp
    shl ecx, 4
    mov dword ptr [ecx + 0x203000], 1 // VIRTIO_BLK_T_OUT
    mov [ecx + 0x203008], eax
    mov byte ptr [ebp + 0x203800], 0xff
    push edi
    add edi, 16
    mov ecx, 1020
    mov eax, edx
6:  imul eax, eax, 1664525
    add eax, 1013904223
    add ebx, eax
    stosd
    dec ecx
    jnz 6b
    pop edi
    mov [edi + 12], ebx             // the sum of all others
    lea eax, [ebp + ebp * 2]
    call hv_test_disk_offer
    inc ebp
    cmp ebp, 8
    jb 5b

    mov al, 'w'
    call hv_test_disk_print
    call hv_test_disk_ring
    mov eax, [0x203800]
    or eax, [0x203804]
    mov al, 'E'
    jnz hv_test_disk_fail
    mov al, 's'
    call hv_test_disk_print
    mov byte ptr [0x203808], 0xff
    mov eax, 24
    call hv_test_disk_offer
    call hv_test_disk_ring
    cmp byte ptr [0x203808], 0
    mov al, 'G'
    jne hv_test_disk_fail
    mov al, 'F'
    call hv_test_disk_print
    mov ecx, 8
7:  rol esi, 4                      // the generation, in hexadecimal
    mov eax, esi
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 8f
    add al, 39
8:  call hv_test_disk_print
    dec ecx
    jnz 7b
    mov al, 10
    call hv_test_disk_print
    pop ebp
    cmp esi, ebp
    je hv_test_disk_power_off
    inc esi
    jmp hv_test_disk_generation

// Prints the letter AL and ends.
hv_test_disk_fail:
    call hv_test_disk_print
hv_test_disk_power_off:
    mov edx, 0x600
    mov al, 0x34
    out dx, al
9:  hlt
    jmp 9b

hv_test_disk_print:
    mov edx, 0x3f8
    out dx, al
    ret

// Writes EAX to the register ECX of the function EBX.
hv_test_disk_pci_write:
    push eax
    lea eax, [ebx + ecx]
    mov edx, 0xcf8
    out dx, eax
    pop eax
    mov edx, 0xcfc
    out dx, eax
    ret

// Reads the register ECX of the function EBX.
hv_test_disk_pci_read:
    lea eax, [ebx + ecx]
    mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    in eax, dx
    ret

// Puts the chain at descriptor AX into the available ring; the index is not written yet.
hv_test_disk_offer:
    mov edx, [0x204000]
    mov ecx, edx
    and ecx, 63
    mov [ecx * 2 + 0x201004], ax
    inc edx
    mov [0x204000], edx
    ret

// Writes the index, rings, and waits until all is used and an interrupt has come, now or before.
hv_test_disk_ring:
    mov eax, [0x204000]
    mov [0x201002], ax
    mov word ptr [{registers} + 0x3000], 0
1:  pause
    cmp ax, [0x202002]
    jne 1b
2:  pause
    test byte ptr [0xfee00220], 2   // interrupt request register: 0x41
    jz 2b
    ret
hv_test_disk_writer_end:
.code64
.text
