// The built-in guest, part 1: how its CPUs start, and the loop over the checks.
//
// Assembled into one read-only section and copied to {base}. All addresses are either relative to
// RIP or computed from the start of the image, so no relocation is left. {base} is below 1 MiB
// and a multiple of 64 KiB, and the image is smaller than that: a real-mode CPU reaches all of it,
// and the low 16 bits of an address are its offset in the image.

.section .rodata.hv_guest, "a", @progbits
.balign 4096
.globl hv_guest_image
.hidden hv_guest_image
hv_guest_image:

// An application processor starts here in real mode, CS based at the image. It goes to 64-bit mode
// in one step: paging and protection are enabled by the same write to CR0.
.code16
guest_ap_start:
    cli
    mov ax, cs
    mov ds, ax
    lgdt [GUEST_GDT_POINTER]
    mov eax, 0x20                   // CR4.PAE
    mov cr4, eax
    mov eax, {base} + {page_tables}
    mov cr3, eax
    mov ecx, 0xc0000080             // EFER
    rdmsr
    or eax, 0x100                   // LME
    wrmsr
    mov eax, 0x80000011             // PG, ET, PE
    mov cr0, eax
    .byte 0x66, 0xea                // jmp far 16:32
    .long {base} + (guest_ap_long - hv_guest_image)
    .word 0x10

.code64
guest_ap_long:
    mov eax, 0x18
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov esp, {base} - 0x1000
    lidt [rip + guest_idt_pointer]
    call guest_enable_lapic
    mov eax, [rdi + 0x20]           // local APIC ID
    shr eax, 24
    mov [rip + guest_ap_id], eax
    mov rax, cr0
    mov [rip + guest_ap_cr0], eax
    mov ecx, 0xc0000080
    rdmsr
    mov [rip + guest_ap_efer], eax
    mov dword ptr [rip + guest_ap_up], 1
1:  sti                             // the rest of its life is answering interrupts
    hlt
    jmp 1b

// The boot CPU starts here, in 64-bit mode with our page tables and our GDT.
.org hv_guest_image + {entry}
guest_entry:
    mov esp, {base}
    lidt [rip + guest_idt_pointer]
    mov al, 0xff                    // no interrupt comes through the two PICs
    out 0x21, al
    out 0xa1, al
    call guest_enable_lapic
    mov edx, {ports} + {checks}
    in eax, dx
    mov r15d, eax                   // r15: the checks to run; r14: the check. Checks keep both.
    xor r14d, r14d
1:  bt r15d, r14d
    jnc 2f
    mov eax, r14d
    mov edx, {ports} + {begin}
    out dx, eax
    lea rax, [rip + guest_checks]
    movzx eax, word ptr [rax + r14 * 2]
    lea rcx, [rip + hv_guest_image]
    add rax, rcx
    cld
    call rax
    mov eax, r14d
    mov edx, {ports} + {done}
    out dx, eax
2:  inc r14d
    cmp r14d, {check_count}
    jb 1b
guest_end:
    mov edx, {ports} + {end}
    out dx, eax
1:  cli
    hlt
    jmp 1b

// Returns its address in rdi.
guest_enable_lapic:
    mov edi, {lapic}
    mov dword ptr [rdi + 0xf0], 0x100 + {spurious}
    ret

// Tells the host what was observed: eax, or rax, low half first.
guest_report:
    mov edx, {ports} + {value}
    out dx, eax
    ret

guest_report_64:
    call guest_report
    shr rax, 32
    jmp guest_report

// The checks, in the order of their numbers.
guest_checks:
    .word guest_long_mode - hv_guest_image
    .word guest_com1 - hv_guest_image
    .word guest_port_1 - hv_guest_image
    .word guest_port_2 - hv_guest_image
    .word guest_port_4 - hv_guest_image
    .word guest_port_string - hv_guest_image
    .word guest_mmio_1 - hv_guest_image
    .word guest_mmio_2 - hv_guest_image
    .word guest_mmio_4 - hv_guest_image
    .word guest_mmio_8 - hv_guest_image
    .word guest_mmio_string - hv_guest_image
    .word guest_readonly - hv_guest_image
    .word guest_lapic_timer - hv_guest_image
    .word guest_com1_ioapic - hv_guest_image
    .word guest_pit_ioapic - hv_guest_image
    .word guest_msi - hv_guest_image
    .word guest_irqfd - hv_guest_image
    .word guest_ioeventfd - hv_guest_image
    .word guest_second_vcpu - hv_guest_image
    .word guest_ipi - hv_guest_image
guest_checks_end:
// Neither assembles if the table has another length: .org does not go back.
.org guest_checks + 2 * {check_count}
.org guest_checks_end
