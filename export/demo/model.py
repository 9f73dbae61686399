"""The demo VLM in torch: CLIP-style tower, two-layer MLP projector, llama-architecture language model.

Parameters carry the names they have in the GGUF files, so that writing those is a copy, but for the rows of ``attn_q``
and ``attn_k``: the rotary embedding here turns the first half of a head against the second, llama.cpp's neighbouring
pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import COLORS, SHAPES, SIDE
from .vocabulary import SIZE

PATCH = 8
GRID = SIDE // PATCH


@dataclass(frozen=True)
class TowerShape:
    width: int = 160
    blocks: int = 4
    heads: int = 5
    hidden: int = 512
    eps: float = 1e-5


@dataclass(frozen=True)
class LanguageShape:
    width: int = 192
    blocks: int = 4
    heads: int = 6
    hidden: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0
    context: int = 2048


class TowerBlock(nn.Module):
    """Pre-LN transformer block: attention over all rows, GELU MLP."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.ln1, self.ln2 = nn.LayerNorm(width, shape.eps), nn.LayerNorm(width, shape.eps)
        self.attn_q, self.attn_k, self.attn_v = (nn.Linear(width, width) for _ in range(3))
        self.attn_out = nn.Linear(width, width)
        self.ffn_up, self.ffn_down = nn.Linear(width, shape.hidden), nn.Linear(shape.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, width = x.shape
        normed = self.ln1(x)
        weight = torch.cat([self.attn_q.weight, self.attn_k.weight, self.attn_v.weight])
        bias = torch.cat([self.attn_q.bias, self.attn_k.bias, self.attn_v.bias])
        qkv = F.linear(normed, weight, bias).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, rows, width))
        return x + self.ffn_down(F.gelu(self.ffn_up(self.ln2(x))))


class Tower(nn.Module):
    """``(B, 3, H, W)`` in [-1, 1] to ``(B, 1 + N, width)``: CLS first, then patches in raster order."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.patch_embd = nn.Conv2d(3, shape.width, PATCH, PATCH, bias=False)
        self.class_embd = nn.Parameter(0.02 * torch.randn(shape.width))
        self.position_embd = nn.Embedding(1 + GRID * GRID, shape.width)
        self.pre_ln = nn.LayerNorm(shape.width, shape.eps)
        self.blk = nn.ModuleList(TowerBlock(shape) for _ in range(shape.blocks))
        nn.init.normal_(self.position_embd.weight, std=0.02)

    def forward(self, pixels: Tensor, cells: Tensor | None = None) -> Tensor:
        """``cells (B, N)``: raster cells of the patches when ``pixels`` are windows of a scene."""
        batch, _, height, width = pixels.shape
        rows, columns = height // PATCH, width // PATCH
        patches = pixels.view(batch, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(patches.reshape(batch, rows * columns, -1), self.patch_embd.weight.flatten(1))
        position = self.position_embd.weight
        where = position[1:] if cells is None else position[1:][cells]
        first = (self.class_embd + position[0]).expand(batch, 1, -1)
        x = self.pre_ln(torch.cat([first.to(x.dtype), x + where], 1))
        for block in self.blk:
            x = block(x)
        return x


class DenseHeads(nn.Module):
    """Training aids, thrown away afterwards: what each patch shows, and what CLS says of the whole scene."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, len(COLORS))
        self.digit = nn.Linear(width, 10)
        self.box = nn.Linear(width, 3)
        self.scene = nn.Linear(width, len(SHAPES) * len(COLORS) + 7)


class LanguageBlock(nn.Module):
    """RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attn_norm, self.ffn_norm = nn.RMSNorm(width, shape.eps), nn.RMSNorm(width, shape.eps)
        self.attn_q, self.attn_k, self.attn_v, self.attn_output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.ffn_gate, self.ffn_up = (
            nn.Linear(width, shape.hidden, bias=False),
            nn.Linear(width, shape.hidden, bias=False),
        )
        self.ffn_down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, front: int, mask: Tensor | None) -> Tensor:
        """Rows before ``front`` attend causally; later rows attend by ``mask (B, 1, later, all)``."""
        batch, rows, width = x.shape
        weight = torch.cat([self.attn_q.weight, self.attn_k.weight, self.attn_v.weight])
        qkv = F.linear(self.attn_norm(x), weight).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(qkv[0], cosine, sine), rotate(qkv[1], cosine, sine), qkv[2]
        mixed = F.scaled_dot_product_attention(
            query[:, :, :front], key[:, :, :front], value[:, :, :front], is_causal=True
        )
        if mask is not None:
            later = F.scaled_dot_product_attention(query[:, :, front:], key, value, attn_mask=mask)
            mixed = torch.cat([mixed, later], 2)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, rows, width))
        up = F.linear(self.ffn_norm(x), torch.cat([self.ffn_gate.weight, self.ffn_up.weight]))
        gate, up = up.chunk(2, -1)
        return x + self.ffn_down(F.silu(gate) * up)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of ``x (B, heads, rows, dim)``, first half against second; tables ``(B, 1, rows, dim / 2)``."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


class LanguageModel(nn.Module):
    """Rows in, hidden states out; ``output`` turns those into logits."""

    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(SIZE, shape.width)
        self.blk = nn.ModuleList(LanguageBlock(shape) for _ in range(shape.blocks))
        self.output_norm = nn.RMSNorm(shape.width, shape.eps)
        self.output = nn.Linear(shape.width, SIZE, bias=False)
        nn.init.normal_(self.token_embd.weight, std=0.5)
        nn.init.normal_(self.output.weight, std=shape.width**-0.5)

    def forward(self, x: Tensor, positions: Tensor, front: int, mask: Tensor | None) -> Tensor:
        """``x (B, rows, width)``, ``positions (B, rows)`` to normalised hidden states ``(B, rows, width)``."""
        half = self.shape.width // self.shape.heads // 2
        rate = self.shape.rope_base ** (-torch.arange(half, device=x.device) / half)
        angle = (positions[..., None].float() * rate)[:, None]
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blk:
            x = block(x, cosine, sine, front, mask)
        return self.output_norm(x)


class DemoVLM(nn.Module):
    """Tower ``v``, projector ``mm``, language model ``lm`` and the training heads ``aid``."""

    def __init__(self, tower: TowerShape, language: LanguageShape) -> None:
        super().__init__()
        self.v = Tower(tower)
        self.mm = nn.Sequential(
            nn.Linear(tower.width, language.width), nn.GELU(), nn.Linear(language.width, language.width)
        )
        self.lm = LanguageModel(language)
        self.aid = DenseHeads(tower.width)
