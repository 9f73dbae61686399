"""What checkpoints of other makers and times say: names of tensors, defaults, settings of the image processor."""

from __future__ import annotations

import json
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf import MODEL_ARCH, get_tensor_name_map

from edge_tokcomp.export.hf_checkpoint import Checkpoint
from edge_tokcomp.export.hf_defaults import MODELS, TOWERS
from edge_tokcomp.export.hf_names import Names
from edge_tokcomp.families import family_for
from hf_folder import as_opengvlab, assert_same, edit, write_folder
from hf_vlms import build

CONFIGS = {
    "clip_vision_model": "CLIPVisionConfig", "pixtral": "PixtralVisionConfig",
    "idefics3_vision": "SmolVLMVisionConfig", "siglip_vision_model": "SiglipVisionConfig",
    "siglip2_vision_model": "Siglip2VisionConfig", "internvl_vision": "InternVLVisionConfig",
    "qwen2_vl_vision": "Qwen2VLVisionConfig", "qwen2_5_vl_vision": "Qwen2_5_VLVisionConfig",
    "qwen3_vl_vision": "Qwen3VLVisionConfig", "llava": "LlavaConfig", "llava_next": "LlavaNextConfig",
    "idefics3": "Idefics3Config", "smolvlm": "SmolVLMConfig", "qwen2_vl": "Qwen2VLConfig",
    "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig", "qwen3_vl_moe": "Qwen3VLMoeConfig",
    "internvl": "InternVLConfig", "gemma3": "Gemma3Config", "lfm2_vl": "Lfm2VlConfig", "mistral3": "Mistral3Config",
}  # fmt: skip


def test_published_names_are_what_llama_cpp_calls_them() -> None:
    table = get_tensor_name_map(MODEL_ARCH.MMPROJ, 4)
    clip = [
        "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "post_layernorm.bias",
        *(f"encoder.layers.3.{part}.{end}" for end in ("weight", "bias") for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1",
            "layer_norm2", "mlp.fc1", "mlp.fc2")),
    ]  # fmt: skip
    names = {
        "mlp": [
            *(f"vision_tower.vision_model.{name}" for name in clip), "vision_tower.vision_model.pre_layrnorm.weight",
            "vision_tower.vision_model.embeddings.class_embedding",
        ],
        "idefics3": [
            *(f"model.vision_model.{name}" for name in clip), "model.connector.modality_projection.proj.weight"
        ],
        "gemma3": ["multi_modal_projector.mm_soft_emb_norm.weight"],
        "lfm2": [
            *(f"vision_tower.vision_model.{name}" for name in clip), "multi_modal_projector.linear_1.weight",
            "multi_modal_projector.linear_2.bias", "multi_modal_projector.layer_norm.weight",
        ],
        "internvl": ["mlp1.0.weight", "mlp1.1.bias", "mlp1.3.weight"],
        "pixtral": [
            "vision_tower.patch_conv.weight", "vision_tower.ln_pre.weight", "multi_modal_projector.linear_1.weight",
            "multi_modal_projector.linear_2.weight", "multi_modal_projector.norm.weight",
            "multi_modal_projector.patch_merger.merging_layer.weight",
            *(f"vision_tower.transformer.layers.2.{part}.weight" for part in (
                "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "attention_norm",
                "ffn_norm", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")),
        ],
        "qwen2vl_merger": [
            "visual.patch_embed.proj.weight", "visual.merger.ln_q.weight", "visual.merger.mlp.0.weight",
            "visual.merger.mlp.2.bias",
            *(f"visual.blocks.1.{part}.bias" for part in (
                "attn.qkv", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.gate_proj", "mlp.up_proj",
                "mlp.down_proj", "mlp.linear_fc1", "mlp.linear_fc2")),
        ],
    }  # fmt: skip
    for projector, stored in names.items():
        ours = Names({"clip.projector_type": projector})
        for name in stored:
            assert ours.of(name) == table.get_name(name, (".weight", ".bias")) is not None, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    config = getattr(transformers, CONFIGS[kind])().to_dict()
    ours = dict(TOWERS.get(kind) or MODELS[kind])
    if "rope_theta" in ours:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if kind == "siglip2_vision_model":
        del ours["image_size"]  # its pictures have any
    if "qwen" in kind or kind == "pixtral":
        ours.pop("layer_norm_eps", None)  # fixed in the code
    theirs = json.loads(json.dumps({key: config[key] for key in ours}))
    for key, value in ours.items():
        assert theirs[key] in (value, [value, value]), key


def test_settings_of_the_image_processor_inside_those_of_the_processor(tmp_path: Path) -> None:
    folder = write_folder(build("qwen2vl"), "qwen2vl", tmp_path / "checkpoint")
    wanted = Checkpoint(folder)
    assert wanted.metadata["clip.vision.image_min_pixels"] == 8 * 16**2
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    edit(folder / "preprocessor_config.json", lambda values: values.update(image_mean=[0.0] * 3))
    assert_same(Checkpoint(folder), wanted)  # where both say something, transformers goes by the former too


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12845056},
    ],
)
def test_how_large_pictures_get_in_every_spelling(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_folder(build("qwen25vl"), "qwen25vl", tmp_path / "checkpoint")
    edit(folder / "preprocessor_config.json", lambda values: [values.pop("size"), values.update(settings)])
    source = Checkpoint(folder)
    limits = family_for(source.metadata).spec(source.metadata, source.shapes).limits
    assert (limits.min_pixels, limits.max_pixels) == (3136, 12845056)
    edit(folder / "preprocessor_config.json", lambda values: [values.pop(key, None) for key in settings])
    assert "clip.vision.image_min_pixels" not in Checkpoint(folder).metadata


def test_pictures_that_are_not_cut(tmp_path: Path) -> None:
    for name, file, key in (
        ("lfm2vl", "preprocessor_config.json", "do_image_splitting"),
        ("internvl_qwen2", "config.json", "dynamic_image_size"),
    ):
        folder = write_folder(build(name), name, tmp_path / name)
        if name == "internvl_qwen2":
            folder = as_opengvlab(folder, tmp_path / "published")
        edit(folder / file, methodcaller("update", {key: False}))
        metadata = Checkpoint(folder).metadata
        assert [metadata[f"clip.vision.preproc_{end}_tiles"] for end in ("min", "max")] == [1, 1]


def test_the_row_break_is_found_in_every_tokenizer_file(tmp_path: Path) -> None:
    folder = write_folder(build("pixtral"), "pixtral", tmp_path / "checkpoint")
    wanted = Checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    for file, values in (
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "a"}, "304": {"content": "[IMG_BREAK]"}}}),
        ("tekken.json", {"special_tokens": [{"rank": 304, "token_str": "[IMG_BREAK]", "is_control": True}]}),
    ):
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        (folder / file).write_text(json.dumps(values))
        assert_same(Checkpoint(folder), wanted)


def test_mistral_has_no_settings_of_an_image_processor(tmp_path: Path) -> None:
    folder = write_folder(build("mistral3"), "mistral3", tmp_path / "checkpoint")
    wanted = Checkpoint(folder)
    (folder / "preprocessor_config.json").unlink()
    assert_same(Checkpoint(folder), wanted)
