"""A small builder of ONNX graphs: the operations a vision tower is made of.

Weights go straight into a data file beside the graph as they come, so that a tower of any size is built in the memory
of its largest tensor, and ONNX Runtime maps them instead of reading them.

Opset 20 and Microsoft's operators of ONNX Runtime 1.17: what JetPack 6 runs. (Opset 23 has an ``Attention`` of its own;
it is no faster and needs ONNX Runtime 1.23.)
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]

_MICROSOFT = "com.microsoft"
_PAGE = 4096
_CACHE_LINE = 64


class Graph:
    """One graph under construction; values are named by the strings its methods return.

    ``path`` is where ``save`` puts the graph; weights go to ``path`` + ``.data``. A context manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = path.with_name(path.name + ".data").open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def input(self, name: str, shape: tuple[int | str, ...]) -> str:
        """Declare an input, float32; a string in ``shape`` names an axis of any length."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, value: str, name: str, shape: tuple[int | str, ...]) -> None:
        """Return ``value`` from the graph, float32, under ``name``."""
        self.node("Identity", value, into=name)
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def save(self) -> None:
        """Write the graph; its data file is complete then."""
        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
        self._data.flush()
        self.path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())

    def node(self, kind: str, *inputs: str, into: str = "", domain: str = "", **attributes: Any) -> str:
        """Add one operation with one output."""
        into = into or f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [into], name=into, domain=domain, **attributes))
        return into

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Add a weight, written to the data file."""
        array = np.ascontiguousarray(array)
        self._data.write(bytes(-self._data.tell() % (_PAGE if array.nbytes > 16 * _PAGE else _CACHE_LINE)))
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": f"{self.path.name}.data", "offset": self._data.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(array.data)
        self._weights.append(tensor)
        return name

    def constant(self, array: NDArray[Any]) -> str:
        """Add a small constant, kept in the graph itself."""
        name = f"constant_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def shape(self, *lengths: int) -> str:
        """A constant to reshape by; 0 keeps an axis, -1 takes what is left."""
        return self.constant(np.array(lengths, dtype=np.int64))

    def linear(self, x: str, name: str, weight: Floats, bias: Floats, int8: bool = False) -> str:
        """``x @ weight.T + bias`` with ``weight (out, in)``; with ``int8`` the product of 8-bit integers."""
        if int8:
            scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / 127
            levels = np.rint(weight / scale[:, None]).astype(np.int8).T
            inputs = [
                x,
                self.weight(f"{name}.levels", levels),
                self.weight(f"{name}.scale", scale),
                "",
                self.weight(f"{name}.bias", bias),
            ]
            return self.node("DynamicQuantizeMatMul", *inputs, domain=_MICROSOFT)
        product = self.node("MatMul", x, self.weight(f"{name}.weight", weight.T), into=f"{name}.product")
        return self.node("Add", product, self.weight(f"{name}.bias", bias))

    def layer_norm(self, x: str, name: str, weight: Floats, bias: Floats, eps: float) -> str:
        """Normalise the last axis."""
        scale, shift = self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias)
        return self.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=eps)

    def activation(self, x: str, kind: str) -> str:
        """``gelu`` (exact), ``quick_gelu`` (``x * sigmoid(1.702 x)``) or ``silu`` (``x * sigmoid(x)``)."""
        if kind == "gelu":
            return self.node("Gelu", x)
        return self.node("QuickGelu", x, domain=_MICROSOFT, alpha={"quick_gelu": 1.702, "silu": 1.0}[kind])

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        """Multi-head attention of ``(B, S, D)`` each, without a mask.

        One fused operator: as fast as MatMul and Softmax apart or faster, and without their ``(heads, S, S)``.
        """
        return self.node("MultiHeadAttention", query, key, value, domain=_MICROSOFT, num_heads=heads)

    def first_row_attention(self, query: str, key: str, heads: int, width: int) -> str:
        """``(B, heads, S)``: the softmax weights of row 0's query over all rows."""
        size = width // heads
        zero, one, axis = (self.constant(np.array([n], dtype=np.int64)) for n in (0, 1, 1))
        first = self.node("Slice", query, zero, one, axis)
        first = self.node("Transpose", self.node("Reshape", first, self.shape(0, 0, heads, size)), perm=[0, 2, 1, 3])
        keys = self.node("Transpose", self.node("Reshape", key, self.shape(0, 0, heads, size)), perm=[0, 2, 3, 1])
        scale = self.constant(np.array(size**-0.5, dtype=np.float32))
        scores = self.node("MatMul", self.node("Mul", first, scale), keys)
        return self.node("Reshape", self.node("Softmax", scores, axis=-1), self.shape(0, heads, -1))

    def patches(self, pixels: str, name: str, weight: Floats, bias: Floats | None) -> str:
        """``pixels (B, 3, H, W)`` to ``(B, N, D)``: a convolution whose stride is its kernel.

        ``weight (D, 3, p, p)``.
        """
        width, _, size, _ = weight.shape
        inputs = [pixels, self.weight(f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", bias))
        grid = self.node("Conv", *inputs, kernel_shape=[size, size], strides=[size, size])
        return self.node("Transpose", self.node("Reshape", grid, self.shape(0, width, -1)), perm=[0, 2, 1])

    def leading_row(self, x: str) -> str:
        """``(B, N, D)`` to ``(B, 1 + N, D)``: a row of zeros put first."""
        return self.node("Pad", x, self.shape(0, 1, 0, 0, 0, 0))
