"""Checkpoints of the tiny transformers models: as ``save_pretrained`` writes them, and as others name things."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from edge_tokcomp.export.hf_checkpoint import Checkpoint
from hf_processors import make_processor, make_tokenizer
from hf_vlms import FAMILIES

Tensors = dict[str, torch.Tensor]


def write_folder(model: PreTrainedModel, name: str, folder: Path, **saved: Any) -> Path:
    """``model``, ``name`` in ``hf_vlms``, with the settings of its image processor and its tokenizer."""
    family = name.partition("_")[0] if name.startswith("internvl") else name
    tokenizer = make_tokenizer(family)
    model.save_pretrained(folder, **saved)
    tokenizer.save_pretrained(folder)
    processor = make_processor(family, tokenizer, FAMILIES[name].preprocessor, model.config)
    processor.image_processor.save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy whose tensors are what ``change`` makes of those of ``folder``."""
    shutil.copytree(folder, target)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    return target


def renamed(folder: Path, target: Path, patterns: Sequence[tuple[str, str]]) -> Path:
    """A copy whose tensors have other names; at least one."""

    def change(tensors: Tensors) -> Tensors:
        names = {name: name for name in tensors}
        for pattern, replacement in patterns:
            names = {name: re.sub(pattern, replacement, new) for name, new in names.items()}
        if all(name == new for name, new in names.items()):
            raise ValueError("nothing is renamed")
        return {names[name]: value for name, value in tensors.items()}

    return changed(folder, target, change)


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    """The same tower in other words."""
    assert found.metadata == wanted.metadata
    assert found.shapes == wanted.shapes
    for name, shape in wanted.shapes.items():
        np.testing.assert_array_equal(found.tensor(name, shape), wanted.tensor(name, shape), err_msg=name)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def as_opengvlab(folder: Path, target: Path) -> Path:
    """InternVL saved by transformers as OpenGVLab publishes it: other names, queries, keys and values as one."""
    layer = r"^vision_tower\.encoder\.layer\.(\d+)\."
    renamed(
        folder, target,
        [
            (rf"{layer}attention\.projection_layer", r"vision_model.encoder.layers.\1.attn.proj"),
            (rf"{layer}layernorm_before", r"vision_model.encoder.layers.\1.norm1"),
            (rf"{layer}layernorm_after", r"vision_model.encoder.layers.\1.norm2"),
            (rf"{layer}lambda_", r"vision_model.encoder.layers.\1.ls"),
            (layer, r"vision_model.encoder.layers.\1."),
            (r"^vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
            (r"^vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
            (r"^vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
            (r"^multi_modal_projector\.layer_norm", "mlp1.0"), (r"^multi_modal_projector\.linear_1", "mlp1.1"),
            (r"^multi_modal_projector\.linear_2", "mlp1.3"),
        ],
    )  # fmt: skip
    path = target / "model.safetensors"
    tensors = load_file(path)
    for name in sorted(tensors):
        if ".attention.q_proj." in name:
            parts = [tensors.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    save_file(tensors, path)
    config = json.loads((target / "config.json").read_text())
    vision = config["vision_config"]
    (target / "config.json").write_text(json.dumps({
        "model_type": "internvl_chat", "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 32,
        "max_dynamic_patch": 12, "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1, "use_thumbnail": True,
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_act": "gelu", "hidden_size": vision["hidden_size"], "image_size": 32,
            "intermediate_size": vision["intermediate_size"], "layer_norm_eps": 1e-6, "norm_type": "layer_norm",
            "num_attention_heads": vision["num_attention_heads"], "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": 4, "qk_normalization": False, "qkv_bias": True,
        },
    }))  # fmt: skip
    return target
