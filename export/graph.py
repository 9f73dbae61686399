"""A small builder of ONNX graphs: the operations a vision tower is made of.

Weights go straight into a data file beside the graph as they come, so that a tower of any size is built in the memory
of its largest tensor, and ONNX Runtime maps them instead of reading them. A graph may also be built over the data file
of another one.

Opset 20 and Microsoft's operators of ONNX Runtime 1.17: what JetPack 6 runs. (Opset 23 has an ``Attention`` of its own;
it is no faster and needs ONNX Runtime 1.23.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]

Weight = Callable[[], Floats]
"""Reads a weight; called where it has to be written."""

_MICROSOFT = "com.microsoft"
_PAGE = 4096
_CACHE_LINE = 64


class Graph:
    """One graph under construction; values are named by the strings its methods return.

    ``path`` is where ``save`` puts the graph; weights go to ``path`` + ``.data``. With ``weights``, another graph, none
    is written: those of that graph are used, and its data file, or a copy or link, belongs beside ``path``. With
    ``half`` weights are stored and rows computed in 16 bits. A context manager.
    """

    def __init__(self, path: Path, weights: Path | None = None, half: bool = False) -> None:
        self.path, self.half = path, half
        self._data = path.with_name(path.name + ".data").open("wb") if weights is None else None
        self._shared: dict[str, onnx.TensorProto] = {}
        if weights is not None:
            model = onnx.load(weights, load_external_data=False)
            self._shared = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._named = 0
        self._weights: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._data is not None:
            self._data.close()

    def input(self, name: str, shape: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> str:
        """Declare an input, float32 or of another ``kind``; a string in ``shape`` names an axis of any length."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, shape: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> None:
        """Return ``value`` from the graph, float32 or of another ``kind``, under ``name``."""
        if self.half and kind == TensorProto.FLOAT:
            self.node("Cast", value, into=name, to=kind)
        else:
            self.node("Identity", value, into=name)
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def save(self, properties: Mapping[str, str] | None = None) -> None:
        """Write the graph with ``properties`` in its metadata; its data file is complete then."""
        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        helper.set_model_props(model, dict(properties or {}))
        if self._data is not None:
            self._data.flush()
        self.path.write_bytes(model.SerializeToString())

    def node(self, kind: str, *inputs: str, into: str = "", domain: str = "", **attributes: Any) -> str:
        """Add one operation with one output."""
        into = into or self._name(kind)
        self._nodes.append(helper.make_node(kind, inputs, [into], name=into, domain=domain, **attributes))
        return into

    def _name(self, kind: str) -> str:
        self._named += 1
        return f"{kind}_{self._named}"

    def weight(self, name: str, read: Callable[[], NDArray[Any]], exact: bool = False) -> str:
        """Add a weight, written to the data file unless that of another graph is used; ``exact``: never in 16 bits."""
        if self._data is None:
            self._weights.append(self._shared[name])
            return name
        array = read()
        if self.half and not exact and array.dtype == np.float32:
            array = array.astype(np.float16)
        self._weights.append(self._write(self._data, name, array))
        return name

    def rows(self, value: str) -> str:
        """A float32 ``value`` in the precision that rows are computed in."""
        return self.node("Cast", value, to=TensorProto.FLOAT16) if self.half else value

    def _write(self, data: BinaryIO, name: str, array: NDArray[Any]) -> onnx.TensorProto:
        array = np.ascontiguousarray(array)
        data.write(bytes(-data.tell() % (_PAGE if array.nbytes > 16 * _PAGE else _CACHE_LINE)))
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": f"{self.path.name}.data", "offset": data.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        data.write(array.data)
        return tensor

    def constant(self, array: NDArray[Any]) -> str:
        """A small constant, kept in the graph itself; added when it is first asked for."""
        what = array.dtype.str, array.shape, array.tobytes()
        if what not in self._constants:
            self._constants[what] = f"constant_{len(self._constants)}"
            self._weights.append(numpy_helper.from_array(array, self._constants[what]))
        return self._constants[what]

    def ints(self, *values: int) -> str:
        """A constant ``(n,) int64``: axes, indices, lengths to reshape by (0 keeps an axis, -1 takes what is left)."""
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: int) -> str:
        """A constant ``() int64``."""
        return self.constant(np.array(value, dtype=np.int64))

    def shape(self, *lengths: int | str) -> str:
        """``(n,) int64`` of numbers and of values ``(1,) int64``, to reshape or expand by (-1: what is left)."""
        if all(isinstance(length, int) for length in lengths):
            return self.ints(*(int(length) for length in lengths))
        parts = [self.ints(length) if isinstance(length, int) else length for length in lengths]
        return self.node("Concat", *parts, axis=0)

    def split(self, x: str, lengths: str, count: int, axis: int) -> list[str]:
        """``x`` in ``count`` parts along ``axis``."""
        outputs = [self._name("Split") for _ in range(count)]
        self._nodes.append(helper.make_node("Split", [x, lengths], outputs, name=outputs[0], axis=axis))
        return outputs

    def loop(
        self, count: str, states: Sequence[tuple[str, int]], step: Callable[[str, list[str]], Sequence[str]]
    ) -> list[str]:
        """``states``, values and their kinds, after ``count () int64`` steps; their shapes may change on the way.

        ``step`` writes one: from its number and the states to the new states.
        """
        outside, self._nodes = self._nodes, []
        number, going = self._name("step"), self._name("going")
        before = [self._name("state") for _ in states]
        after = step(number, before)
        still = self.node("Identity", going)
        # What a step hands on under its old name must have a name of its own.
        after = [self.node("Identity", value) for value in after]
        kinds = [kind for _, kind in states]
        declare = helper.make_tensor_value_info
        inputs, outputs = (
            [declare(name, kind, None) for name, kind in zip(values, kinds, strict=True)] for values in (before, after)
        )
        counted = [declare(number, TensorProto.INT64, ()), declare(going, TensorProto.BOOL, ())]
        outputs.insert(0, declare(still, TensorProto.BOOL, ()))
        body = helper.make_graph(self._nodes, self._name("body"), [*counted, *inputs], outputs)
        self._nodes = outside
        found = [self._name("Loop") for _ in after]
        values = [count, "", *(value for value, _ in states)]
        self._nodes.append(helper.make_node("Loop", values, found, name=found[0], body=body))
        return found

    def linear(self, x: str, name: str, weight: Weight, bias: Weight | None, int8: bool = False) -> str:
        """``x @ weight.T + bias`` with ``weight (out, in)``; with ``int8`` the product of 8-bit integers."""
        if int8:
            levels = cache(lambda: _eight_bits(weight()))
            inputs = [
                x,
                self.weight(f"{name}.levels", lambda: levels()[0]),
                self.weight(f"{name}.scale", lambda: levels()[1]),
                "",
            ]
            if bias is not None:
                inputs.append(self.weight(f"{name}.bias", bias))
            return self.node("DynamicQuantizeMatMul", *inputs, domain=_MICROSOFT)
        product = self.node("MatMul", x, self.weight(f"{name}.weight", lambda: weight().T), into=f"{name}.product")
        return product if bias is None else self.node("Add", product, self.weight(f"{name}.bias", bias))

    def norm(self, x: str, name: str, weight: Weight, bias: Weight | None, eps: float, kind: str = "") -> str:
        """Normalise the last axis: ``rms`` without, otherwise with its mean taken off."""
        inputs = [x, self.weight(f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", bias))
        # ONNX Runtime keeps its RMS norm under ONNX's own domain.
        operator = "SimplifiedLayerNormalization" if kind.startswith("rms") else "LayerNormalization"
        return self.node(operator, *inputs, axis=-1, epsilon=eps)

    def activation(self, x: str, kind: str) -> str:
        """``gelu`` (exact), ``gelu_tanh``, ``quick_gelu`` (``x * sigmoid(1.702 x)``) or ``silu``."""
        if kind in ("gelu", "gelu_tanh"):
            return self.node("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")
        return self.node("QuickGelu", x, domain=_MICROSOFT, alpha={"quick_gelu": 1.702, "silu": 1.0}[kind])


def _eight_bits(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """``(in, out) int8`` and ``(out,)``: levels and what one level is worth."""
    scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / 127
    return np.rint(weight / scale[:, None]).astype(np.int8).T, scale
