"""Writer of small mmproj GGUFs with random weights, laid out as llama.cpp's legacy LLaVA converter does.

The weights come from a transformers ``CLIPVisionModel``, whose values are replaced by what the file holds after
rounding, so that model and file describe the same tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import CLIPVisionConfig, CLIPVisionModel

from by_transformers import clip_names
from edge_tokcomp.families.tower_spec import Step

MLP = (Step("linear", "mm.0"), Step("gelu"), Step("linear", "mm.2"))
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass
class Tiny:
    """A file and the torch modules with the same weights."""

    path: Path
    tower: CLIPVisionModel
    projector: torch.nn.Sequential


def write_mmproj(
    path: Path,
    *,
    kind: Kind = Kind.F32,
    blocks: int = 3,
    width: int = 64,
    heads: int = 4,
    ffn: int = 128,
    out: int = 96,
    image: int = 48,
    patch: int = 8,
    activation: str = "quick_gelu",
    layers: list[int] | None = None,
    swapped: bool = True,
    seed: int = 0,
    edit: Callable[[dict[str, Any]], None] = lambda metadata: None,
    drop: tuple[str, ...] = (),
    reshape: dict[str, tuple[int, ...]] | None = None,
) -> Tiny:
    """Write an mmproj holding all but the last block of a CLIP of ``blocks + 1``.

    ``swapped``: feed-forward linears under each other's names, as the legacy converter wrote them. ``edit`` changes the
    metadata before it is written (None removes a key), ``drop`` leaves tensors out, ``reshape`` gives others a shape.
    """
    tower, projector = random_model(blocks + 1, width, heads, ffn, out, image, patch, activation, seed)
    tensors = {name: round_to(kind, name, value) for name, value in _named(tower, projector, blocks).items()}
    metadata: dict[str, Any] = {
        "clip.has_text_encoder": False, "clip.has_vision_encoder": True, "clip.has_llava_projector": True,
        "clip.projector_type": "mlp", "clip.use_gelu": activation == "gelu", "clip.use_silu": activation == "silu",
        "clip.vision.image_size": image, "clip.vision.patch_size": patch, "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": ffn, "clip.vision.projection_dim": 768,
        "clip.vision.attention.head_count": heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.block_count": blocks,
        "clip.vision.image_mean": MEAN, "clip.vision.image_std": STD, "clip.vision.feature_layer": layers,
    }  # fmt: skip
    edit(metadata)
    writer = gguf.GGUFWriter(path, arch="clip")
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, value in tensors.items():
        if name in drop:
            continue
        stored = (reshape or {}).get(name)
        data = np.zeros(stored, np.float32) if stored else value
        stored_kind = kind_of(kind, name, data)
        label = _swap(name) if swapped else name
        writer.add_tensor(label, quantize(data, stored_kind), raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(path, tower, projector)


def random_model(
    layers: int, width: int, heads: int, ffn: int, out: int, image: int, patch: int, activation: str, seed: int
) -> tuple[CLIPVisionModel, torch.nn.Sequential]:
    """A tower in which everything matters: attention far from uniform, norms and biases away from one and zero."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, image_size=image,
        patch_size=patch, hidden_act=activation, attn_implementation="eager",
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.GELU(), torch.nn.Linear(out, out)).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (tower, projector):
            for name, value in module.named_parameters():
                noise = torch.randn(value.shape, generator=random)
                if value.ndim == 1:
                    value.copy_(0.2 * noise + float("norm" in name or "layrnorm" in name) * float("weight" in name))
                elif "embedding" in name:
                    value.copy_(0.1 * noise)
                else:
                    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                    value.copy_(gain * noise * value.shape[1] ** -0.5)
    return tower, projector


def kind_of(kind: Kind, name: str, value: np.ndarray) -> Kind:
    """The type a tensor is stored in: matrices in ``kind``, the convolution in F16 at best, all else F32."""
    if value.ndim == 4:
        return Kind.F32 if kind == Kind.F32 else Kind.F16
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if value.ndim == 2 and name.endswith(".weight") and value.shape[-1] % block == 0 else Kind.F32


def round_to(kind: Kind, name: str, parameter: torch.Tensor) -> np.ndarray:
    """The values of ``parameter`` once stored; the parameter takes them too."""
    value = parameter.detach().numpy()
    stored = kind_of(kind, name, value)
    rounded = dequantize(quantize(value, stored), stored).reshape(value.shape)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(rounded.copy()))
    return rounded.copy()


def _named(tower: CLIPVisionModel, projector: torch.nn.Sequential, blocks: int) -> dict[str, torch.Tensor]:
    values = {name.removeprefix("vision_model."): value for name, value in tower.named_parameters()}
    named = {short: values[name] for short, name in clip_names(blocks).items()}
    return named | {f"mm.{name}": value for name, value in projector.named_parameters()}


def _swap(name: str) -> str:
    if ".ffn_up." in name:
        return name.replace("ffn_up", "ffn_down")
    return name.replace("ffn_down", "ffn_up")


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
