"""The machine code in a cubin, which is a 64-bit ELF file.

Source: System V ABI, https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.sheader.html.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx
SECTION = struct.Struct("<II8x8xQQ")  # sh_name, sh_type, sh_offset, sh_size


def text(cubin: bytes) -> bytes:
    """The one section named ".text.NAME"; raises ValueError unless there is one."""
    table, size, count, names = HEADER.unpack_from(cubin)
    sections = [SECTION.unpack_from(cubin, table + size * i) for i in range(count)]
    names_at = sections[names][2]
    found = [
        cubin[offset : offset + length]
        for name, _, offset, length in sections
        if cubin[names_at + name :].startswith(b".text.")
    ]
    if len(found) != 1:
        raise ValueError(f"a cubin with {len(found)} functions: a Triton kernel has one")
    return found[0]
