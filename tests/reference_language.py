"""A llama-architecture language model in plain NumPy, with image rows dropped between its layers.

What pruned decoding is checked against, independent of llama.cpp: dequantised weights, float32, every step the
textbook's. Slow and small on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.methods.layer_step import LayerStep
from edge_tokcomp.tokens import Ints

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights of one decoder layer, ``(out, in)`` each; queries and keys turn neighbouring pairs, as in GGUF files."""

    attn_norm: Floats
    qkv: Floats
    attn_output: Floats
    ffn_norm: Floats
    gate_up: Floats
    ffn_down: Floats


@dataclass(frozen=True, eq=False)
class Prompt:
    """Rows of a prompt at language width: before the image, of the image, after it.

    ``crop (n,)``: the image, crop or frame each image row belongs to.
    """

    lead: Floats
    image: Floats
    crop: Ints
    text: Floats


class ReferenceLanguage:
    """The model in a GGUF file; raises ``TokcompError`` unless it is of the llama architecture with plain heads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        heads = values.get("llama.attention.head_count")
        if heads is None or values.get("llama.attention.head_count_kv", heads) != heads:
            raise TokcompError(f"{path}: the NumPy reference runs llama models of plain attention heads only")
        self.heads, self.depth = int(heads), int(values["llama.block_count"])
        self.eps = np.float32(values["llama.attention.layer_norm_rms_epsilon"])
        weights = {
            tensor.name.removesuffix(".weight"): np.asarray(
                dequantize(tensor.data, tensor.tensor_type), np.float32
            ).reshape(tuple(reversed(tensor.shape.tolist())))
            for tensor in reader.tensors
        }
        self.table, self.final_norm = weights["token_embd"], weights["output_norm"]
        self.output = weights.get("output", self.table)
        self.layers = []
        for number in range(self.depth):
            prefix = f"blk.{number}."
            part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            qkv = np.concatenate([part["attn_q"], part["attn_k"], part["attn_v"]])
            gate_up = np.concatenate([part["ffn_gate"], part["ffn_up"]])
            self.layers.append(
                Layer(part["attn_norm"], qkv, part["attn_output"], part["ffn_norm"], gate_up, part["ffn_down"])
            )
        half = self.table.shape[1] // self.heads // 2
        self.rate = float(values.get("llama.rope.freq_base", 10000.0)) ** (-np.arange(half) / half)

    def generate(
        self, prompt: Prompt, steps: Sequence[LayerStep], ends: Sequence[int], most: int
    ) -> tuple[list[int], list[int]]:
        """Greedy tokens, up to one of ``ends`` or ``most``, and the image rows that each layer saw.

        Steps at one layer act in the order given, each on the rows that the one before left. Rows that are left are
        renumbered without gaps, as stock llama.cpp needs them.
        """
        x, cache, seen = self._prefill(prompt, steps)
        tokens: list[int] = []
        while True:
            tokens.append(int(np.argmax(self.output @ self._norm(x, self.final_norm)[0])))
            if tokens[-1] in ends or len(tokens) == most:
                return tokens, seen
            x = self.table[tokens[-1:]]
            for number, layer in enumerate(self.layers):
                past_key, past_value = cache[number]
                query, key, value = self._project(layer, x, past_key.shape[1])
                key, value = np.concatenate([past_key, key], axis=1), np.concatenate([past_value, value], axis=1)
                cache[number] = key, value
                x = self._finish(layer, x, attention(query, key) @ value)

    def _prefill(
        self, prompt: Prompt, steps: Sequence[LayerStep]
    ) -> tuple[Floats, list[tuple[Floats, Floats]], list[int]]:
        """The last row's state, every layer's keys and values, and the image rows each layer saw."""
        at: list[list[tuple[LayerStep, float]]] = [[] for _ in self.layers]
        for step in steps:
            for number, amount in step.layers(self.depth).items():
                at[number].append((step, amount))
        start = len(prompt.lead)
        x, crop = np.concatenate([prompt.lead, prompt.image, prompt.text]), prompt.crop
        before: Floats | None = None
        keys = np.zeros(len(x), np.float32)
        cache, seen = [], []
        for number, layer in enumerate(self.layers):
            for step, amount in at[number]:
                image, text = start + np.arange(len(crop)), np.arange(start + len(crop), len(x))
                looked = before if step.attention == "previous" else None
                if step.attention == "next":
                    query, key, _ = self._project(layer, x, 0)
                    looked = attention(query[:, text], key).mean(axis=0)
                state = LayerState(
                    x[image], crop, len(prompt.image), image, text, looked, keys, x[text], self.final_norm
                )
                stay = step.survivors(state, amount)
                rows = np.concatenate([np.arange(start), image[stay], text])
                x, crop, keys = x[rows], crop[stay], keys[rows]
                before = None if before is None else before[:, rows]
            seen.append(len(crop))
            query, key, value = self._project(layer, x, 0)
            weights = attention(query, key)
            before = weights.mean(axis=0)[start + len(crop) :]
            keys = np.abs(key).sum(axis=(0, 2))
            cache.append((key, value))
            x = self._finish(layer, x, weights @ value)
        return x[-1:], cache, seen

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * weight, np.float32)

    def _project(self, layer: Layer, x: Floats, start: int) -> tuple[Floats, Floats, Floats]:
        """``(heads, n, dim)`` queries, keys (both turned to positions from ``start``) and values."""
        qkv = (self._norm(x, layer.attn_norm) @ layer.qkv.T).reshape(len(x), 3, self.heads, -1).transpose(1, 2, 0, 3)
        angle = (start + np.arange(len(x)))[:, None] * self.rate
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = qkv[:2, ..., 0::2], qkv[:2, ..., 1::2]
        turned = np.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1).reshape(qkv[:2].shape)
        return turned[0], turned[1], qkv[2]

    def _finish(self, layer: Layer, x: Floats, mixed: Floats) -> Floats:
        x = x + mixed.transpose(1, 0, 2).reshape(x.shape) @ layer.attn_output.T
        gate, up = np.split(self._norm(x, layer.ffn_norm) @ layer.gate_up.T, 2, axis=1)
        return np.asarray(x + (gate / (1 + np.exp(-gate)) * up) @ layer.ffn_down.T, np.float32)


def attention(query: Floats, key: Floats) -> Floats:
    """Causal softmax weights ``(heads, n, m)`` of the last n of m rows."""
    count, length = query.shape[1], key.shape[1]
    scores = query @ key.transpose(0, 2, 1) / np.float32(np.sqrt(query.shape[2]))
    rows = np.arange(length - count, length)
    scores = np.where(np.arange(length)[None, :] <= rows[:, None], scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
