"""The machine code that looks for a tensor, by itself: on this machine and on emulated ones."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import unicorn
from llama_cpp.llama_cpp import ggml_backend_sched_eval_callback as EvalCallback
from unicorn import arm64_const as arm
from unicorn import x86_const as x86

from edge_tokcomp.language import callback_code
from edge_tokcomp.language.callback_code import AARCH64, X86_64, State, native_callback

OFFSET = 256
"""Of the name in the tensors made here."""

CODE, TENSOR, STATE, STACK, PYTHON, BACK = (0x10000 * number for number in range(1, 7))
GARBAGE = 0x5A5A5A5A5A5A5A5A


@dataclass
class Machine:
    """A processor: its code, where arguments go, and registers that a function must leave as they are."""

    code: bytes
    kind: tuple[int, int]
    arguments: tuple[int, int, int]
    answer: int
    stack: int
    kept: tuple[int, ...]
    link: int | None = None


X86 = Machine(
    X86_64, (unicorn.UC_ARCH_X86, unicorn.UC_MODE_64), (x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX),
    x86.UC_X86_REG_EAX, x86.UC_X86_REG_RSP,
    (x86.UC_X86_REG_RBX, x86.UC_X86_REG_RBP, x86.UC_X86_REG_R12, x86.UC_X86_REG_R13, x86.UC_X86_REG_R14,
     x86.UC_X86_REG_R15),
)  # fmt: skip
ARM = Machine(
    AARCH64, (unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM),
    (arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1, arm.UC_ARM64_REG_X2), arm.UC_ARM64_REG_W0, arm.UC_ARM64_REG_SP,
    tuple(getattr(arm, f"UC_ARM64_REG_X{number}") for number in range(19, 30)), arm.UC_ARM64_REG_X30,
)  # fmt: skip


@dataclass
class Emulated:
    """The code on a made-up processor; ``called``: what it handed on, each time."""

    machine: Machine
    state: State = field(default_factory=lambda: State(name_offset=OFFSET))
    called: list[tuple[int, int, int]] = field(default_factory=list)
    tensor: int = TENSOR

    def let_python_answer(self) -> None:
        self.state.python = PYTHON

    def __call__(self, name: bytes, ask: bool) -> bool:
        engine, machine = unicorn.Uc(*self.machine.kind), self.machine
        for place in (CODE, TENSOR, STATE, STACK, PYTHON, BACK):
            engine.mem_map(place, 0x1000)
        engine.mem_protect(CODE, 0x1000, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        engine.mem_write(CODE, machine.code)
        engine.mem_write(TENSOR + OFFSET, name)
        engine.mem_write(STATE, bytes(self.state))
        # Above the lowest byte a bool may hold anything.
        given = (TENSOR, GARBAGE << 8 & (1 << 64) - 1 | ask, STATE)
        stack = STACK + 0x800
        for register, value in zip(machine.arguments, given, strict=True):
            engine.reg_write(register, value)
        for register in machine.kept:
            engine.reg_write(register, GARBAGE)
        if machine.link is None:
            stack -= 8
            engine.mem_write(stack, struct.pack("<Q", BACK))
        else:
            engine.reg_write(machine.link, BACK)
        engine.reg_write(machine.stack, stack)
        jumped: list[int] = []

        def arrived(engine: unicorn.Uc, _address: int, _size: int, _data: object) -> None:
            jumped.append(engine.reg_read(machine.stack))
            self.called.append(tuple(engine.reg_read(register) for register in machine.arguments))
            engine.emu_stop()

        engine.hook_add(unicorn.UC_HOOK_CODE, arrived, begin=PYTHON, end=PYTHON + 1)
        engine.emu_start(CODE, BACK, count=100)
        assert [engine.reg_read(register) for register in machine.kept] == [GARBAGE] * len(machine.kept)
        if jumped:
            assert self.called[-1] == given
            assert jumped == [stack]
            assert machine.link is None or engine.reg_read(machine.link) == BACK
            return True
        assert engine.reg_read(machine.stack) == stack + 8 * (machine.link is None)
        ctypes.memmove(
            ctypes.addressof(self.state), bytes(engine.mem_read(STATE, ctypes.sizeof(State))), ctypes.sizeof(State)
        )
        answer = engine.reg_read(machine.answer)
        assert answer in (0, 1)
        return bool(answer)


class Here:
    """The code on this machine."""

    def __init__(self) -> None:
        self.state = State(name_offset=OFFSET)
        self.called: list[tuple[int, bool, int]] = []
        self._function = EvalCallback(native_callback())
        self._python = EvalCallback(self._answer)
        self._memory = ctypes.create_string_buffer(OFFSET + 64)
        self.tensor = ctypes.addressof(self._memory)

    def _answer(self, *arguments: Any) -> bool:
        self.called.append(arguments)
        return True

    def let_python_answer(self) -> None:
        self.state.python = ctypes.cast(self._python, ctypes.c_void_p).value

    def __call__(self, name: bytes, ask: bool) -> bool:
        ctypes.memmove(self.tensor + OFFSET, name.ljust(64, b"\xcc"), 64)
        count = len(self.called)
        answer = bool(self._function(self.tensor, ask, ctypes.addressof(self.state)))
        assert self.called[count:] in ([], [(self.tensor, ask, ctypes.addressof(self.state))])
        return answer


needs_code = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="no code for this machine"
)


@pytest.fixture(params=["x86-64", "aarch64", pytest.param("here", marks=needs_code)])
def code(request: pytest.FixtureRequest) -> Emulated | Here:
    return {"x86-64": lambda: Emulated(X86), "aarch64": lambda: Emulated(ARM), "here": Here}[request.param]()


WATCHED = [b"l_out-7", b"l_out-10", b"l", b"l_out-1", b"result_output-9"]
NAMES = [
    *WATCHED, b"", b"l_out-", b"l_out-70", b"l_out-8", b"L_out-7", b"l_out-107", b"result_output-8",
    b"result_output-99", b"result_o", b"l_out-7 (view)", b"node_31", b"attn_norm-7", b"\xff" * 15, b"a" * 63,
]  # fmt: skip


@pytest.mark.parametrize("watched", WATCHED)
def test_asked_it_says_whether_the_name_is_that_one(code: Emulated | Here, watched: bytes) -> None:
    code.state.watch(watched)
    for name in NAMES:
        # ggml leaves what an earlier, longer name left behind the end of a shorter one.
        for behind in (b"", b"\0" * 32, b"garbage behind it", b"l_out-7\0", b"\xff" * 20):
            assert code((name + b"\0" + behind)[:64], True) == (name == watched), (name, behind)
    assert (code.state.hits, code.state.tensor, code.called) == (0, 0, [])


def test_watching_for_none_it_answers_no(code: Emulated | Here) -> None:
    code.state.watch(b"l_out-7")
    code.state.watch(None)
    assert not any(code(name + b"\0", True) for name in NAMES)


def test_told_of_a_tensor_it_notes_it_counts_and_stops(code: Emulated | Here) -> None:
    code.state.watch(b"l_out-7")
    for hits in (1, 2, 3):
        assert code(b"l_out-7\0", True)
        assert not code(b"l_out-7\0", False)
        assert (code.state.tensor, code.state.hits) == (code.tensor, hits)
    code.state.watch(b"l_out-8")
    assert (code.state.tensor, code.state.hits) == (0, 0)
    assert not code(b"l_out-7\0", True)


@pytest.mark.parametrize("ask", [True, False])
def test_where_another_answers_it_hands_on_what_it_was_given(code: Emulated | Here, ask: bool) -> None:
    code.state.watch(b"l_out-7")
    code.let_python_answer()
    for name in (b"l_out-7\0", b"other\0"):
        assert code(name, ask)  # the other says yes
    assert len(code.called) == 2
    assert (code.state.tensor, code.state.hits) == (0, 0)


@needs_code
def test_the_code_lies_where_nobody_can_write() -> None:
    address = native_callback()
    assert address == native_callback()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (rights,) = [
        line[1] for line in lines for start, end in [line[0].split("-")] if int(start, 16) <= address < int(end, 16)
    ]
    assert rights.startswith("r-x")


def test_other_machines_and_hardened_systems_have_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[[], int] = native_callback.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        assert make() == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert make() == 0
    if sys.platform != "linux":
        return

    class Hardened:
        def __init__(self, *_: object, **__: object) -> None:
            self.mprotect = Refusing()

    class Refusing:
        def __call__(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(callback_code.ctypes, "CDLL", Hardened)
    assert make() == 0
