"""The decoder of llama, qwen2, qwen2vl and gemma3 in plain torch, with image rows dropped before its layers.

Written from the architectures' descriptions, in float64, with no part in common with what it is held against: RMS norm,
rotary attention over key-value heads that serve several query heads each, SwiGLU. Every layer has a cache of its own.
Rows that are left stand at contiguous positions in each layer, those of qwen2vl at their own (time, height, width).
Gemma 3 has further norms, of queries, keys and what is added, GELU, and sliding windows in five of six layers; the rows
of an image see one another there.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.tokens import Rows
from tiny_models import TinyModel

SECTIONS = (2, 3, 3)
"""Of the rotary frequencies of qwen2vl, lowest number first: those turned by time, by height, by width."""

WINDOW = 32
"""Rows that a row of gemma3 sees in layers with a window, as ``tiny_models`` writes it."""


class TorchSequence:
    """One sequence, pruned by ``steps``, which are shown what this model computes.

    ``eight_bits``: what is multiplied with weights is rounded as llama.cpp rounds it for quantized ones; ``edge``: how
    near a value came to being rounded the other way, in steps, which would change all that follows.
    """

    def __init__(self, tiny: TinyModel, steps: Sequence[Any] = (), *, eight_bits: bool = False) -> None:
        self.tiny, self.head, self.eight_bits = tiny, tiny.n_embd // tiny.n_head, eight_bits
        self.edge, self.gemma = 0.5, tiny.architecture == "gemma3"
        self.weights = {name: torch.from_numpy(weight).double() for name, weight in tiny.weights.items()}
        self.at = [
            [(step, step.layers(tiny.n_layer)[layer]) for step in steps if layer in step.layers(tiny.n_layer)]
            for layer in range(tiny.n_layer)
        ]
        nothing = torch.zeros(0, tiny.n_head_kv, self.head, dtype=torch.float64)
        self.caches = [(nothing, nothing)] * tiny.n_layer

    def fork(self) -> TorchSequence:
        """Another sequence that goes on from here."""
        other = copy(self)
        other.caches = list(self.caches)
        return other

    def feed(self, batch: Sequence[Rows]) -> NDArray[np.float64]:
        """Append rows; logits of the text rows among them, ``(t, n_vocab)``."""
        x = torch.from_numpy(np.concatenate([rows.embeddings for rows in batch])).double()
        places = torch.from_numpy(np.concatenate([self._places(rows) for rows in batch], axis=1))
        crop = np.concatenate([np.full(len(rows), -1) if rows.crop is None else rows.crop for rows in batch])
        entered = int((crop >= 0).sum())
        # Of image rows that see one another the number of their ``Rows``, of others none.
        block = np.repeat(np.arange(len(batch)), [len(rows) for rows in batch])
        block = np.where((crop >= 0) & self.gemma, block, -1)
        asked = len(crop) - 1 - int(np.flatnonzero(crop >= 0).max(initial=-1))  # text rows after the image
        looks = keys = None
        for layer in range(self.tiny.n_layer):
            held = len(self.caches[layer][0])
            for step, amount in self.at[layer]:
                image, words = np.flatnonzero(crop >= 0), np.arange(len(crop) - asked, len(crop))
                if not len(image):
                    continue
                if step.attention == "next":
                    shown, _ = self._attention(layer, *self._heads(layer, x, places), block)
                    shown = shown.mean(0)[words]
                else:
                    shown = None if step.attention == "none" or looks is None else looks[words]
                state = LayerState(
                    x[image].float().numpy(), crop[image], entered, held + image, held + words,
                    None if shown is None else shown.float().numpy(),
                    None if keys is None else keys.abs().sum((1, 2)).float().numpy(),
                    x[words].float().numpy(), self.tiny.weights["output_norm.weight"],
                )  # fmt: skip
                stay = step.survivors(state, amount)
                left = np.sort(np.concatenate([np.flatnonzero(crop < 0), image[stay]]))
                x, places, crop, block = x[left], places[:, left], crop[left], block[left]
                seen = np.concatenate([np.arange(held), held + left])
                looks = None if looks is None else looks[left][:, seen]
                keys = None if keys is None else keys[seen]
            if not len(x):
                return np.zeros((0, self.tiny.n_vocab))
            query, key, value = self._heads(layer, x, places)
            weights, mixed = self._attention(layer, query, key, value, block)
            self.caches[layer] = tuple(
                torch.cat([old, new]) for old, new in zip(self.caches[layer], (key, value), strict=True)
            )
            looks, keys = weights.mean(0), self.caches[layer][0]
            x = x + self._added(layer, self._times(mixed, self._weight(layer, "attn_output")), "post_attention_norm")
            normed = self._norm(x, self._weight(layer, "ffn_norm"))
            gate, up = (self._times(normed, self._weight(layer, f"ffn_{part}")) for part in ("gate", "up"))
            gate = _looked_up_gelu(gate) if self.gemma else torch.nn.functional.silu(gate)
            x = x + self._added(layer, self._times(gate * up, self._weight(layer, "ffn_down")), "post_ffw_norm")
        final = self._norm(x[crop < 0], self.weights["output_norm.weight"])
        return self._times(final, self.weights["token_embd.weight" if self.gemma else "output.weight"]).numpy()

    def _added(self, layer: int, x: torch.Tensor, norm: str) -> torch.Tensor:
        return self._norm(x, self._weight(layer, norm)) if self.gemma else x

    def _places(self, rows: Rows) -> NDArray[np.int64]:
        """``(3, n)``: time, height, width."""
        return np.broadcast_to(rows.positions, (3, len(rows))) if rows.positions.ndim == 1 else rows.positions[:3]

    def _weight(self, layer: int, name: str, end: str = "weight") -> torch.Tensor:
        return self.weights[f"blk.{layer}.{name}.{end}"]

    def _times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.eight_bits:
            x, edge = _eight_bits(x)
            self.edge = min(self.edge, edge)
        return x @ weight.T

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.tiny.norm_eps).sqrt() * weight

    def _heads(self, layer: int, x: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        """Queries ``(n, heads, d)``, keys and values ``(n, key heads, d)`` of rows that follow the cached ones."""
        if self.tiny.architecture != "qwen2vl":
            places = (len(self.caches[layer][0]) + torch.arange(len(x))).expand(3, -1)
        half = self.head // 2
        section = torch.repeat_interleave(torch.arange(3), torch.tensor(SECTIONS))
        angle = places[section].T * self.tiny.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
        normed = self._norm(x, self._weight(layer, "attn_norm"))
        found = []
        for part in "qkv":
            rows = self._times(normed, self._weight(layer, f"attn_{part}"))
            if self.tiny.architecture.startswith("qwen2"):
                rows = rows + self._weight(layer, f"attn_{part}", "bias")
            rows = rows.view(len(x), -1, self.head)
            if part != "v":
                rows = self._norm(rows, self._weight(layer, f"attn_{part}_norm")) if self.gemma else rows
                first, second = rows[..., :half], rows[..., half:]
                rows = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
            found.append(rows)
        return found

    def _attention(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``(heads, n, m)`` over the cached rows and these, and what they mix, ``(n, heads * d)``."""
        held = len(self.caches[layer][0])
        key, value = (
            torch.cat([old, new]).repeat_interleave(self.tiny.n_head // self.tiny.n_head_kv, dim=1)
            for old, new in zip(self.caches[layer], (key, value), strict=True)
        )
        scores = torch.einsum("nhd,mhd->hnm", query, key) / self.head**0.5
        before = held + np.arange(len(query))[:, None] - np.arange(len(key))[None, :]
        hidden = before < 0
        hidden[:, held:] &= (block[:, None] != block[None, :]) | (block[:, None] < 0)
        if self.gemma and layer % 6 < 5:
            hidden |= before >= WINDOW
        weights = scores.masked_fill(torch.from_numpy(hidden), -torch.inf).softmax(-1)
        return weights, torch.einsum("hnm,mhd->nhd", weights, value).reshape(len(query), -1)


def _looked_up_gelu(x: torch.Tensor) -> torch.Tensor:
    """As llama.cpp looks it up between -10 and 10, in a table of half floats; beyond it is 0 or ``x``."""
    looked_up = torch.nn.functional.gelu(x.half().double(), approximate="tanh").half().double()
    return torch.where(x.abs() < 10, looked_up, x.relu())


def _eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """``x (n, k)`` in whole multiples of a 127th of the largest in each 32 values, that step in half precision
    (ggml's Q8_0); and how near a value was to the middle of two multiples, or a step to that of two halves."""
    blocks = x.reshape(len(x), -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    exact = torch.where(step > 0, blocks / step, torch.zeros_like(blocks))
    half = step.half().double()
    apart = torch.nextafter(half.half(), torch.tensor(torch.inf).half()).double() - half
    middles = [exact - exact.round(), (step - half) / apart]
    edge = min((0.5 - middle.abs()).min().item() for middle in middles)
    return (exact.round() * half).reshape(x.shape), edge
