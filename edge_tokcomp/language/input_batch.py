"""``llama_batch``: what one call into llama.cpp is given, in memory that stays the same from call to call."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]


class _Fields(ctypes.Structure):
    """``llama_batch`` with plain addresses: typed pointers take microseconds to make, for every generated token."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


class InputBatch:
    """Up to ``most`` rows, filled anew for each call; ``value`` is what llama.cpp takes."""

    def __init__(self, most: int) -> None:
        self._tokens, self._sequences = np.zeros(most, np.int32), np.zeros(most, np.int32)
        self._positions, self._outputs = np.zeros(4 * most, np.int32), np.zeros(most, np.int8)
        self._counts = np.ones(most, np.int32)
        # seq_id is an array of pointers, one a row, each to that row's single sequence id.
        places = self._sequences.itemsize * np.arange(most, dtype=np.uintp)
        self._owners = places + np.uintp(address(self._sequences))
        constant = map(address, (self._positions, self._counts, self._owners, self._outputs))
        self._fields = _Fields(0, None, None, *constant)
        self._token_address = address(self._tokens)
        self.value = llama.llama_batch.from_buffer(self._fields)

    def fill(
        self, inputs: NDArray[np.float32] | Int32s, positions: Int32s, sequences: Int32s, outputs: NDArray[np.bool_]
    ) -> NDArray[Any]:
        """Rows ``(n, n_embd_inp)`` or tokens ``(n,)`` at ``positions`` ``(n,)`` or ``(4, n)``; the rest is ``(n,)``.

        Returns what has to live as long as the call; raises ``ValueError`` for more rows than there is room for.
        """
        count, most = len(inputs), len(self._counts)
        if not 0 < count <= most:
            raise ValueError(f"a batch of {count} rows; 1 to {most} can be had")
        fields: Any = self._fields
        fields.n_tokens = count
        self._positions[: positions.size] = positions.ravel()
        self._sequences[:count] = sequences
        self._outputs[:count] = outputs
        if inputs.ndim == 1:
            self._tokens[:count] = inputs
            fields.token, fields.embd = self._token_address, None
            return self._tokens
        rows = np.ascontiguousarray(inputs, np.float32)
        fields.token, fields.embd = None, address(rows)
        return rows


def address(array: NDArray[Any]) -> int:
    """Where its values begin."""
    return int(array.__array_interface__["data"][0])
