"""Tensors of a context's graph, read while or right after llama.cpp computes them.

What comes after the last tensor that was asked for is not computed: a layer segment has no use for its output head.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from llama_cpp._ctypes_extensions import load_shared_library
from numpy.typing import NDArray

from ..errors import TokcompError
from .callback_code import LONGEST_NAME, State, native_callback

Floats = NDArray[np.float32]

_SHAPE_OFFSET = 16
"""Of ``ne`` in ``struct ggml_tensor``, after its type and its buffer; checked before use."""


class Readout:
    """What one context's graph is asked for. Give it to the context at creation, and ``expect`` before each decode.

    Tensors go by llama.cpp's names: ``l_out-7``, and ``Qcur-7`` and ``Kcur-7``, which are taken after their rotation.
    A single tensor that is no rotated one is noted by machine code where the system allows it; otherwise, and for
    several, a Python function answers for every node of the graph.
    """

    def __init__(self) -> None:
        self._ggml = _ggml()
        self._state = State(name_offset=self._ggml.name_offset)
        self._python = llama.ggml_backend_sched_eval_callback(self._answer)
        self._python_address = ctypes.cast(self._python, ctypes.c_void_p).value or 0
        self._expected: tuple[bytes, ...] = ()
        self._found: dict[bytes, Floats] = {}
        self._hits: dict[bytes, int] = {}
        self._fault: BaseException | None = None

    @property
    def callback(self) -> Any:
        """For ``llama_context_params.cb_eval``."""
        if address := native_callback():
            return llama.ggml_backend_sched_eval_callback(address)
        return self._python

    @property
    def user_data(self) -> int:
        """For ``llama_context_params.cb_eval_user_data``."""
        return ctypes.addressof(self._state)

    def expect(self, names: Sequence[str]) -> None:
        """What the next decode is to give; it computes no further. With no names it computes everything."""
        self._expected = tuple(name.encode() for name in names)
        self._found, self._hits, self._fault = {}, {}, None
        name = self._expected[0] if names else None
        native = len(names) <= 1 and not (name and (_rotated(name) or len(name) > LONGEST_NAME))
        self._state.python = 0 if native and native_callback() else self._python_address
        self._state.watch(name if native else None)

    def take(self) -> list[Floats]:
        """The tensors, in the order they were expected, slowest axis first: ``l_out (n, n_embd)``, ``Qcur (n, heads,
        head_dim)``. Call it right after the decode: the next one overwrites what they are read from.

        Raises ``TokcompError`` where the graph has none of that name or computed it in parts.
        """
        if self._fault is not None:
            raise self._fault
        if not self._state.python and self._expected:
            self._hits[self._expected[0]] = self._state.hits
            if self._state.hits == 1:
                self._found[self._expected[0]] = self._ggml.copy(self._state.tensor, 2)
        for name in self._expected:
            if self._hits.get(name) != 1:
                raise TokcompError(
                    f"llama.cpp computed {name.decode()} {self._hits.get(name, 0)} times where one was expected: a "
                    "layer of another kind; choose another layer or step, or run the uncut model"
                )
        return [self._found[name] for name in self._expected]

    def _answer(self, tensor: int, ask: bool, _user_data: object) -> bool:
        # An exception in a callback would be printed and lost.
        try:
            name = self._ggml.name(tensor)
            if ask:
                return name in self._expected and (not _rotated(name) or self._ggml.op(tensor) == b"ROPE")
            self._hits[name] = self._hits.get(name, 0) + 1
            self._found[name] = self._ggml.copy(tensor, 3 if _rotated(name) else 2)
            return len(self._found) < len(self._expected)
        except BaseException as fault:  # noqa: BLE001
            self._fault = fault
            return False


def _rotated(name: bytes) -> bool:
    return name.startswith((b"Qcur-", b"Kcur-"))


class _Ggml:
    """The few functions of ggml that look at a tensor, and where its name and shape stand in it."""

    def __init__(self) -> None:
        folder = Path(os.path.abspath(llama.__file__)).parent / "lib"
        library = load_shared_library("ggml-base", folder)
        tensor, size = ctypes.c_void_p, ctypes.c_size_t
        self.name = _function(library.ggml_get_name, ctypes.c_char_p, tensor)
        self.op = _function(library.ggml_op_desc, ctypes.c_char_p, tensor)
        self._n_bytes = _function(library.ggml_nbytes, size, tensor)
        self._get = _function(library.ggml_backend_tensor_get, None, tensor, ctypes.c_void_p, size, size)
        self.name_offset = self._measured(library)

    def _measured(self, library: Any) -> int:
        """Where the name stands, by a tensor of our own; raises ``TokcompError`` if the shape is not where it was."""

        class Parameters(ctypes.Structure):
            _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        pointer, extent = ctypes.c_void_p, ctypes.c_int64
        make = _function(library.ggml_new_tensor_3d, pointer, pointer, ctypes.c_int, extent, extent, extent)
        where = _function(library.ggml_get_name, pointer, pointer)
        context = _function(library.ggml_init, pointer, Parameters)(Parameters(1 << 16, None, True))
        try:
            tensor = make(context, llama.GGML_TYPE_F32, 7, 11, 13)
            if self.shape(tensor, 3) != (13, 11, 7):
                raise TokcompError(
                    "this build of llama.cpp lays out its tensors in another way, so layer segments cannot be read; "
                    "install the version of llama-cpp-python that edge-tokcomp asks for"
                )
            return int(where(tensor)) - int(tensor)
        finally:
            _function(library.ggml_free, None, pointer)(context)

    @staticmethod
    def shape(tensor: int, axes: int) -> tuple[int, ...]:
        """Of the fastest ``axes`` axes, slowest first."""
        return tuple(reversed((ctypes.c_int64 * axes).from_address(tensor + _SHAPE_OFFSET)))

    def copy(self, tensor: int, axes: int) -> Floats:
        """The values of a float32 tensor of so many axes, from whatever device they are on."""
        values = np.empty(self.shape(tensor, axes), np.float32)
        if self._n_bytes(tensor) != values.nbytes:
            raise TokcompError(f"llama.cpp holds {self.name(tensor)!r} in another type than float32")
        self._get(tensor, values.ctypes.data, 0, values.nbytes)
        return values


def _function(symbol: Any, result: Any, *arguments: Any) -> Any:
    # A prototype of our own: attributes set on the symbol would change it for everybody.
    prototype = ctypes.CFUNCTYPE(result, *arguments)
    return prototype(ctypes.cast(symbol, ctypes.c_void_p).value or 0)


@lru_cache(maxsize=1)
def _ggml() -> _Ggml:
    return _Ggml()
