// The built-in guest, part 3: interrupts, the doorbell and the second CPU.
//
// Interrupts are off except while a check awaits one. Every wait ends after 2^33 cycles of the
// TSC, a few seconds, and then what did not come is reported as missing.

guest_lapic_timer:
    mov edi, {lapic}
    mov dword ptr [rdi + 0x3e0], 0xb        // divide by 1
    mov dword ptr [rdi + 0x320], {timer}    // one-shot
    mov dword ptr [rdi + 0x380], 100000
    mov ecx, {timer}
    jmp guest_await_and_report

guest_com1_ioapic:
    mov edi, {ioapic}
    mov ebx, {com1_vector}
    mov esi, 0x10 + 2 * {com1_pin}  // register of its redirection entry, low half
    call guest_set_pin
    mov edx, {com1} + 4             // modem control: OUT2 and loopback
    mov al, 0x18
    out dx, al
    mov edx, {com1} + 1             // interrupt enable: data available
    mov al, 1
    out dx, al
    mov edx, {com1}
    mov al, {loopback}
    out dx, al
    mov ecx, {com1_vector}
    call guest_await_and_report
    mov edx, {com1} + 2             // interrupt identification
    in al, dx
    movzx eax, al
    call guest_report
    mov edx, {com1}
    in al, dx
    movzx eax, al
    call guest_report
    mov edx, {com1} + 1
    xor eax, eax
    out dx, al
    mov edx, {com1} + 4
    mov al, 8
    out dx, al
    mov ebx, 0x10000                // masked
    mov esi, 0x10 + 2 * {com1_pin}
    jmp guest_set_pin

guest_pit_ioapic:
    mov edi, {ioapic}
    mov ebx, {pin0}
    mov esi, 0x10                   // register of pin 0's redirection entry, low half
    call guest_set_pin
    mov ebx, {pit}
    mov esi, 0x14                   // and of pin 2's
    call guest_set_pin
    mov al, 0x30                    // channel 0, low byte then high byte, mode 0: once
    out 0x43, al
    xor eax, eax
    out 0x40, al
    mov al, 1                       // 256 ticks: 215 us
    out 0x40, al
    mov ecx, {pit}
    call guest_await_and_report
    mov eax, [rip + guest_seen + 4 * {pin0}]
    call guest_report
    mov ebx, 0x10000                // mask both
    mov esi, 0x10
    call guest_set_pin
    mov esi, 0x14
guest_set_pin:
    lea eax, [rsi + 1]
    mov [rdi], eax
    mov dword ptr [rdi + 0x10], 0   // to local APIC 0
    mov [rdi], esi
    mov [rdi + 0x10], ebx           // fixed, edge-triggered
    ret

guest_msi:
    mov ecx, {msi}
    jmp guest_ask_and_await
guest_irqfd:
    mov ecx, {irqfd}
guest_ask_and_await:
    mov eax, ecx
    mov edx, {ports} + {send}
    out dx, eax

// Awaits the interrupt with vector ecx and reports how often it has come.
guest_await_and_report:
    lea rsi, [rip + guest_seen]
    lea rsi, [rsi + rcx * 4]
    call guest_await
    jmp guest_report

// Awaits that the dword at rsi is not 0, and returns it in eax.
guest_await:
    call guest_cycles
    mov r8d, 1
    shl r8, 33
    add r8, rax
    sti
1:  cmp dword ptr [rsi], 0
    jne 2f
    pause
    call guest_cycles
    cmp rax, r8
    jb 1b
2:  cli
    mov eax, [rsi]
    ret

guest_cycles:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

guest_ioeventfd:
    mov edi, {mmio} + {doorbell}
    mov ecx, {doorbell_rings}
1:  mov dword ptr [rdi], {doorbell_value}
    loop 1b
    mov dword ptr [rdi], {doorbell_other}
    ret

guest_second_vcpu:
    mov ebx, 0x4500                 // INIT, assert
    call guest_send_to_second
    lea ebx, [rip + hv_guest_image]
    shr ebx, 12
    or ebx, 0x4600                  // SIPI: start at this page
    call guest_send_to_second
    lea rsi, [rip + guest_ap_up]
    call guest_await
    call guest_report
    mov eax, [rip + guest_ap_id]
    call guest_report
    mov eax, [rip + guest_ap_cr0]
    call guest_report
    mov eax, [rip + guest_ap_efer]
    jmp guest_report

guest_ipi:
    mov ebx, 0x4000 + {ping}
    call guest_send_to_second
    mov ecx, {pong}
    call guest_await_and_report
    mov eax, [rip + guest_seen + 4 * {ping}]
    jmp guest_report

guest_send_to_second:
    mov edi, {lapic}
    mov dword ptr [rdi + 0x310], 1 << 24    // to local APIC 1
    mov [rdi + 0x300], ebx
    ret

// One entry per vector: pushes an error code where the CPU does not, then the vector.
.balign 16
guest_stubs:
.set GUEST_VECTOR, 0
.rept {vectors}
    .if !(GUEST_VECTOR == 8 || (GUEST_VECTOR >= 10 && GUEST_VECTOR <= 14) || GUEST_VECTOR == 17 || GUEST_VECTOR == 21 || GUEST_VECTOR == 29 || GUEST_VECTOR == 30)
    push 0
    .endif
    .byte 0x6a, GUEST_VECTOR        // push the vector
    jmp guest_handler
    .balign 16
    .set GUEST_VECTOR, GUEST_VECTOR + 1
.endr

guest_handler:
    cmp dword ptr [rsp], 32
    jb guest_exception
    push rax
    push rcx
    mov ecx, [rsp + 16]
    lea rax, [rip + guest_seen]
    lock inc dword ptr [rax + rcx * 4]
    cmp ecx, {spurious}
    je 2f
    mov eax, {lapic}
    cmp ecx, {ping}
    jne 1f
    mov dword ptr [rax + 0x310], 0          // to local APIC 0
    mov dword ptr [rax + 0x300], 0x4000 + {pong}
1:  mov dword ptr [rax + 0xb0], 0           // end of interrupt
2:  pop rcx
    pop rax
    add rsp, 16
    iretq

guest_exception:
    pop rbx
    pop rax                         // error code
    call guest_report
    pop rax                         // RIP
    call guest_report
    mov rax, cr2
    call guest_report
    mov eax, ebx
    mov edx, {ports} + {fault}
    out dx, eax
    jmp guest_end

// How often each vector came, and what the second CPU says of itself.
.balign 4
guest_seen:
    .fill {vectors}, 4, 0
guest_ap_up:
    .long 0
guest_ap_id:
    .long 0
guest_ap_cr0:
    .long 0
guest_ap_efer:
    .long 0
