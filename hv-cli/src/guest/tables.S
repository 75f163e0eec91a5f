// The built-in guest, part 4: descriptor tables and page tables, ready to use.

.balign 16
guest_idt:
.set GUEST_VECTOR, 0
.rept {vectors}                     // interrupt gates, present, to ring 0
    .word (guest_stubs - hv_guest_image) + GUEST_VECTOR * 16, 0x10, 0x8e00, {base} >> 16
    .long 0, 0
    .set GUEST_VECTOR, GUEST_VECTOR + 1
.endr
guest_idt_end:
guest_idt_pointer:
    .word guest_idt_end - guest_idt - 1
    .quad {base} + (guest_idt - hv_guest_image)

guest_gdt_pointer:
    .word 4 * 8 - 1
    .long {base} + {gdt}
.set GUEST_GDT_POINTER, guest_gdt_pointer - hv_guest_image

.org hv_guest_image + {gdt}
    .quad 0, 0
    .quad 0x00af9b000000ffff        // 0x10: 64-bit code
    .quad 0x00cf93000000ffff        // 0x18: data

// The first and the fourth GiB, one to one, in pages of 2 MiB: RAM and devices.
.org hv_guest_image + {page_tables}
    .quad {base} + {page_tables} + 0x1003
    .fill 511, 8, 0
    .quad {base} + {page_tables} + 0x2003, 0, 0, {base} + {page_tables} + 0x3003
    .fill 508, 8, 0
.set GUEST_PAGE, 0
.rept 512
    .quad (GUEST_PAGE << 21) + 0x83
    .set GUEST_PAGE, GUEST_PAGE + 1
.endr
.set GUEST_PAGE, 3 * 512
.rept 512
    .quad (GUEST_PAGE << 21) + 0x83
    .set GUEST_PAGE, GUEST_PAGE + 1
.endr
.org hv_guest_image + {size}
.text
