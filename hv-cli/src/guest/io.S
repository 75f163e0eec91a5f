// The built-in guest, part 2: the CPU mode, the serial port, and accesses that leave the guest.
//
// Where the guest reads a value of the host's choice, it writes back the complement: the host then
// knows that both directions carry every bit.

guest_long_mode:
    mov rax, cr0
    call guest_report
    mov rax, cr4
    call guest_report
    mov ecx, 0xc0000080             // EFER
    rdmsr
    call guest_report
    mov eax, cs
    call guest_report
    mov rax, 0x1122334455667788     // in 32-bit mode the prefix is an instruction of its own
    shr rax, 32
    jmp guest_report

guest_com1:
    mov edx, {com1} + 7             // the scratch register holds a byte
    mov al, 0x5a
    out dx, al
    in al, dx
    movzx ebx, al
    not al
    out dx, al
    in al, dx
    mov bh, al
    mov eax, ebx
    call guest_report
    mov edx, {com1} + 5             // line status
    in al, dx
    movzx eax, al
    call guest_report
    lea rsi, [rip + guest_banner]
    mov ecx, {banner_len}
1:  mov ebx, 1000                   // tries until the transmitter is ready
    mov edx, {com1} + 5
2:  in al, dx
    test al, 0x20
    jnz 3f
    dec ebx
    jnz 2b
    ret
3:  mov edx, {com1}
    outsb
    loop 1b
    ret

guest_port_1:
    mov edx, {ports} + {data}
    in al, dx
    movzx ebx, al
    not al
    out dx, al
    mov eax, ebx
    jmp guest_report

guest_port_2:
    mov edx, {ports} + {data}
    in ax, dx
    movzx ebx, ax
    not eax
    out dx, ax
    mov eax, ebx
    jmp guest_report

guest_port_4:
    mov edx, {ports} + {data}
    in eax, dx
    mov ebx, eax
    not eax
    out dx, eax
    mov eax, ebx
    jmp guest_report

guest_port_string:
    mov edx, {ports} + {string}
    lea rdi, [rip + guest_buffer]
    mov ecx, 8
    rep insb
    mov ecx, 8
    rep insw
    mov ecx, 8
    rep insd
    call guest_complement_buffer
    lea rsi, [rip + guest_buffer]
    mov ecx, 8
    rep outsb
    mov ecx, 8
    rep outsw
    mov ecx, 8
    rep outsd
    ret

guest_mmio_1:
    mov edi, {mmio} + {mmio_data}
    mov al, [rdi]
    movzx ebx, al
    not al
    mov [rdi], al
    mov eax, ebx
    jmp guest_report

guest_mmio_2:
    mov edi, {mmio} + {mmio_data}
    mov ax, [rdi]
    movzx ebx, ax
    not eax
    mov [rdi], ax
    mov eax, ebx
    jmp guest_report

guest_mmio_4:
    mov edi, {mmio} + {mmio_data}
    mov eax, [rdi]
    mov ebx, eax
    not eax
    mov [rdi], eax
    mov eax, ebx
    jmp guest_report

guest_mmio_8:
    mov edi, {mmio} + {mmio_data}
    mov rax, [rdi]
    mov rbx, rax
    not rax
    mov [rdi], rax
    mov rax, rbx
    jmp guest_report_64

guest_mmio_string:
    mov esi, {mmio} + {mmio_string}
    lea rdi, [rip + guest_buffer]
    call guest_move_all_widths
    call guest_complement_buffer
    lea rsi, [rip + guest_buffer]
    mov edi, {mmio} + {mmio_string}
guest_move_all_widths:
    mov ecx, 8
    rep movsb
    mov ecx, 8
    rep movsw
    mov ecx, 8
    rep movsd
    mov ecx, 8
    rep movsq
    ret

guest_complement_buffer:
    lea rbx, [rip + guest_buffer]
    mov ecx, {buffer_len} / 8
1:  not qword ptr [rbx + rcx * 8 - 8]
    loop 1b
    ret

guest_readonly:
    mov edi, {mmio} + {mmio_rom}
    mov rax, [rdi]
    mov rbx, rax
    call guest_report_64
    not rbx
    mov [rdi], rbx
    mov rax, [rdi]
    jmp guest_report_64

guest_banner:
    .ascii "hello from the built-in guest\r\n"
.org guest_banner + {banner_len}
.balign 8
guest_buffer:
    .fill {buffer_len}, 1, 0
