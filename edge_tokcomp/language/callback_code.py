"""A callback for llama.cpp that is not Python: machine code that knows one tensor by its name.

llama.cpp asks its evaluation callback about every node of the graph, some hundreds for each generated token. Asked in
Python that takes microseconds each and the interpreter's lock, which other threads may hold for milliseconds. The code
here compares sixteen bytes and returns. ``STATE`` is what it reads and writes:

* ``python``: the address of a callback that is to answer instead, or 0;
* ``name_offset``: where in ``struct ggml_tensor`` the name stands; ``name``, ``mask``: what its first sixteen bytes
  must be, and which of them count (behind a shorter name stands what is left of an earlier one);
* ``tensor``, ``hits``: the tensor that was computed, and how often one was.

Asked before a node is computed it says whether the name is that one. Told that the node is computed, it notes the
tensor and answers false: what follows in the graph is not computed.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
import struct
import sys
from functools import lru_cache

logger = logging.getLogger(__name__)


LONGEST_NAME = 15
"""Bytes that the code can compare, without the one that ends a name."""


class State(ctypes.Structure):
    """What the code reads and writes, at the address llama.cpp hands to it as ``user_data``."""

    _fields_ = (
        ("python", ctypes.c_uint64),
        ("name_offset", ctypes.c_uint64),
        ("name", ctypes.c_uint64 * 2),
        ("mask", ctypes.c_uint64 * 2),
        ("tensor", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
    )

    def watch(self, name: bytes | None) -> None:
        """Look for the tensor of this name, of at most ``LONGEST_NAME`` bytes, or for none."""
        wanted = b"\xff" * 16 if name is None else (name + b"\0").ljust(16, b"\0")
        mask = b"\xff" * 16 if name is None else (b"\xff" * (len(name) + 1)).ljust(16, b"\0")
        self.name[:] = struct.unpack("<2Q", wanted)
        self.mask[:] = struct.unpack("<2Q", mask)
        self.tensor = self.hits = 0


# bool callback(struct ggml_tensor * t, bool ask, void * state)
X86_64 = bytes.fromhex(
    "f30f1efa"  # endbr64
    "488b02"  # mov rax, [rdx]          state->python
    "4885c0"  # test rax, rax
    "7402"  # je native
    "ffe0"  # jmp rax
    "4084f6"  # native: test sil, sil   ask
    "7427"  # je data
    "488b4a08"  # mov rcx, [rdx + 8]    state->name_offset
    "488b040f"  # mov rax, [rdi + rcx]
    "48234220"  # and rax, [rdx + 32]   state->mask[0]
    "483b4210"  # cmp rax, [rdx + 16]   state->name[0]
    "751d"  # jne no
    "488b440f08"  # mov rax, [rdi + rcx + 8]
    "48234228"  # and rax, [rdx + 40]
    "483b4218"  # cmp rax, [rdx + 24]
    "750e"  # jne no
    "b801000000"  # mov eax, 1
    "c3"  # ret
    "48897a30"  # data: mov [rdx + 48], rdi   state->tensor
    "48ff4238"  # inc qword [rdx + 56]  state->hits
    "31c0"  # no: xor eax, eax
    "c3"  # ret
)
AARCH64 = bytes.fromhex(
    "430040f9"  # ldr x3, [x2]          state->python
    "430000b4"  # cbz x3, native
    "60001fd6"  # br x3
    "81010036"  # native: tbz w1, 0, data
    "440440f9"  # ldr x4, [x2, 8]       state->name_offset
    "0400048b"  # add x4, x0, x4
    "851840a9"  # ldp x5, x6, [x4]
    "472042a9"  # ldp x7, x8, [x2, 32]  state->mask
    "a500078a"  # and x5, x5, x7
    "c600088a"  # and x6, x6, x8
    "472041a9"  # ldp x7, x8, [x2, 16]  state->name
    "bf0007eb"  # cmp x5, x7
    "c00048fa"  # ccmp x6, x8, 0, eq
    "e0179f1a"  # cset w0, eq
    "c0035fd6"  # ret
    "401800f9"  # data: str x0, [x2, 48]
    "431c40f9"  # ldr x3, [x2, 56]
    "63040091"  # add x3, x3, 1
    "431c00f9"  # str x3, [x2, 56]      state->hits
    "00008052"  # mov w0, 0
    "c0035fd6"  # ret
)

_CODE = {"x86_64": X86_64, "aarch64": AARCH64}


@lru_cache(maxsize=1)
def native_callback() -> int:
    """The address of the code, or 0 where there is none for this machine or memory may not be made executable."""
    code = _CODE.get(platform.machine()) if sys.platform == "linux" else None
    if code is None:
        logger.info(
            "hidden states are read by a Python callback: there is no other for %s on %s", platform.machine(),
            sys.platform,
        )  # fmt: skip
        return 0
    # Never writable and executable at once, as hardened systems ask; those that allow neither way say no here.
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        logger.info("hidden states are read by a Python callback: the system forbids executable memory")
        return 0
    _pages.append(page)
    return address


_pages: list[mmap.mmap] = []
"""Kept for the life of the process: contexts hold the address."""
