"""Writer of the mmproj GGUF of a transformers model: keys, tensor names, shapes and orders as llama.cpp converts them.

LLaVA goes by the legacy converter (feed-forward linears under each other's names, the last block and the final norm
left out), every other family by the present one. Weights in the model take the values the file holds after rounding,
so that model and file describe the same tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from hf_mmproj_keys import metadata_of
from hf_vlms import Ids
from tiny_models import pair_order

_FILE_TYPE = {Kind.F32: 0, Kind.F16: 1, Kind.Q8_0: 7}
_TOWER = [
    (r"(?:vision_tower|vision_model)\.(?:embeddings\.)?(?:patch_embedding|patch_embeddings\.projection|patch_conv)\b",
     "v.patch_embd"),
    (r"(?:vision_tower|vision_model)\.embeddings\.position_embedding\b", "v.position_embd"),
    (r"vision_tower\.embeddings\.position_embeddings\b", "v.position_embd.weight"),
    (r"vision_tower\.embeddings\.(?:class_embedding|cls_token)\b", "v.class_embd"),
    (r"vision_tower\.(?:pre_layrnorm|ln_pre)\b", "v.pre_ln"),
    (r"(?:vision_tower|vision_model)\.post_layernorm\b", "v.post_ln"),
    (r"visual\.patch_embed\.proj\b", "v.patch_embd"),
    (r"visual\.pos_embed\b", "v.position_embd"),
    (r"visual\.merger\.(?:ln_q|norm)\b", "v.post_ln"),
    (r"visual\.merger\.(?:mlp\.0|linear_fc1)\b", "mm.0"),
    (r"visual\.merger\.(?:mlp\.2|linear_fc2)\b", "mm.2"),
    (r"(?:vision_tower|vision_model)\.(?:encoder|transformer)\.layers?\.(\d+)\.", r"v.blk.\1."),
    (r"visual\.blocks\.(\d+)\.", r"v.blk.\1."),
    (r"connector\.modality_projection\.proj\b", "mm.model.fc"),
    (r"multi_modal_projector\.mm_input_projection_weight", "mm.input_projection.weight"),
    (r"multi_modal_projector\.mm_soft_emb_norm\b", "mm.soft_emb_norm"),
    (r"multi_modal_projector\.patch_merger\.merging_layer\b", "mm.patch_merger"),
]  # fmt: skip
_BLOCK = [
    (r"(?:self_attn|attention)\.([qkv])_proj\b", r"attn_\1"),
    (r"attn\.qkv\b", "attn_qkv"),
    (r"attention\.([qk])_norm\b", r"attn_\1_norm"),
    (r"(?:self_attn\.out_proj|attention\.(?:o_proj|projection_layer)|attn\.proj)\b", "attn_out"),
    (r"(?:layer_norm1|layernorm_before|norm1|attention_norm)\b", "ln1"),
    (r"(?:layer_norm2|layernorm_after|norm2|ffn_norm)\b", "ln2"),
    (r"(?:mlp|feed_forward)\.(?:fc1|up_proj|linear_fc1)\b", "ffn_up"),
    (r"(?:mlp|feed_forward)\.(?:fc2|down_proj|linear_fc2)\b", "ffn_down"),
    (r"(?:mlp|feed_forward)\.gate_proj\b", "ffn_gate"),
    (r"lambda_([12])\b", r"ls\1.weight"),
]
_LINEARS = {
    "llava15": ("mm.0", "mm.2"), "llava_next": ("mm.0", "mm.2"),
    "internvl_qwen2": ("mm.model.mlp.1", "mm.model.mlp.3"), "internvl_qwen3": ("mm.model.mlp.1", "mm.model.mlp.3"),
}  # fmt: skip


@dataclass
class _Tensor:
    """A tensor of the file: a view of a parameter, its rows in another order or raised by ``added`` where needed."""

    name: str
    view: torch.Tensor
    rows: np.ndarray | None = None
    added: float = 0.0

    def stored(self, kind: Kind) -> np.ndarray:
        """The data in ``kind``; the parameter takes the values that are left of it."""
        view = self.view if self.rows is None else self.view[self.rows]
        data = quantize(view.detach().contiguous().numpy() + np.float32(self.added), kind)
        rounded = torch.from_numpy(dequantize(data, kind).reshape(view.shape) - np.float32(self.added))
        with torch.no_grad():
            if self.rows is None:
                self.view.copy_(rounded)
            else:
                self.view[self.rows] = rounded
        return data


def write_mmproj_of(
    model: PreTrainedModel,
    family: str,
    path: Path,
    *,
    kind: Kind = Kind.F32,
    edit: Callable[[dict[str, Any]], None] = lambda metadata: None,
    drop: tuple[str, ...] = (),
    ids: Ids | None = None,
) -> Path:
    """Write the vision tower and projector of ``model``, matrices in ``kind`` (F32, F16 or Q8_0).

    ``edit`` changes the metadata before it is written (None removes a key), ``drop`` leaves tensors out. ``ids``: where
    the table of tokens holds Pixtral's row break, as given to ``build``.
    """
    metadata = metadata_of(model, family) | {"general.file_type": _FILE_TYPE[kind]}
    edit(metadata)
    writer = gguf.GGUFWriter(path, arch="clip")
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in _tensors(model, family, ids or Ids()):
        if tensor.name not in drop:
            chosen = _kind_of(kind, family, tensor)
            writer.add_tensor(tensor.name, tensor.stored(chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: PreTrainedModel, family: str, ids: Ids) -> Iterator[_Tensor]:
    config = model.config.vision_config
    for source, value in model.model.named_parameters():
        name = _name(source, family, config)
        if source == "language_model.embed_tokens.weight" and family in ("pixtral", "mistral3"):
            yield _Tensor("v.token_embd.img_break", value[ids.row_break])
        elif source.startswith(("language_model.", "text_model.")):
            continue
        elif family.startswith("llava"):
            last = f"v.blk.{config.num_hidden_layers - 1}."
            if not name.startswith((last, "v.post_ln")):
                yield _Tensor(name, value)
        elif "attn_qkv" in name and family != "qwen3vl":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                yield _Tensor(name.replace("attn_qkv", f"attn_{letter}"), part)
        elif name == "v.patch_embd.weight" and value.ndim == 5:
            yield _Tensor(name, value[:, :, 0])
            yield _Tensor(f"{name}.1", value[:, :, 1])
        elif name == "v.patch_embd.weight" and family == "lfm2vl":
            yield _Tensor(name, value.view(len(value), 16, 16, 3).permute(0, 3, 1, 2))
        elif family in ("pixtral", "mistral3") and ("attn_q." in name or "attn_k." in name):
            yield _Tensor(name, value, rows=pair_order(len(value), config.num_attention_heads))
        else:
            yield _Tensor(name, value, added=float(name == "mm.soft_emb_norm.weight"))


def _name(source: str, family: str, config: Any) -> str:
    if source == "image_newline":
        return "model.image_newline"
    name = source
    for pattern, short in _TOWER:
        name = re.sub(f"^{pattern}", short, name)
    if name.startswith("v.blk."):
        for pattern, short in _BLOCK:
            name = re.sub(rf"(?<=\.\d\.){pattern}", short, name)
    first, second = _LINEARS.get(family, ("mm.1", "mm.2"))
    norm = "mm.model.mlp.0" if family.startswith("internvl") else "mm.input_norm"
    for part, short in (("linear_1", first), ("linear_2", second), ("(?:layer_)?norm", norm)):
        name = re.sub(rf"^multi_modal_projector\.{part}\b", short, name)
    if level := re.match(r"visual\.deepstack_merger_list\.(\d)\.(?:linear_)?", name):
        name = f"v.deepstack.{config.deepstack_visual_indexes[int(level[1])]}.{name[level.end() :]}"
    if family.startswith("llava") and (feed := re.search(r"ffn_(up|down)", name)):
        name = name.replace(feed[0], "ffn_down" if feed[1] == "up" else "ffn_up")
    return name


def _kind_of(kind: Kind, family: str, tensor: _Tensor) -> Kind:
    name, shape = tensor.name, tensor.view.shape
    if family.startswith("llava"):
        if len(shape) == 4 or (name.startswith("mm.") and len(shape) == 2 and kind == Kind.F32):
            return Kind.F16
        return kind if len(shape) == 2 and name.endswith(".weight") and shape[-1] % 32 == 0 else Kind.F32
    if len(shape) == 1 or name.endswith("_norm.weight") or name == "v.position_embd.weight":
        return Kind.F32
    if name == "mm.input_projection.weight":
        return Kind.F16
    if ".patch_embd.weight" in name or ".patch_merger.weight" in name:
        siglip = family in ("idefics3", "smolvlm", "gemma3")
        return Kind.F16 if kind == Kind.F16 and not siglip else Kind.F32
    if not name.endswith(".weight"):
        return Kind.F32
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


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
