"""Towers of random weights that only llama.cpp has: CogVLM's, Gemma-3n's, Gemma-4's, HunyuanVL's and DeepSeek-V4's."""

from __future__ import annotations

from pathlib import Path

from mtmd_towers import BLOCKS, FFN, HEADS, PATCH, PATCHES, TOWER, WIDTH, block_of, norms_of, write

Shapes = dict[str, tuple[int, ...]]
INSIDE = 48


def write_cogvlm(path: Path, out: int = 64) -> Path:
    """Squares of 48 pixels, fused queries, a gated projector, learned rows around."""
    patches = (48 // PATCH) ** 2
    shapes: Shapes = {**PATCHES, "v.class_embd": (WIDTH,), "v.position_embd.weight": (patches + 1, WIDTH)}
    for number in range(BLOCKS):
        shapes |= block_of(number, ("qkv",))
    shapes |= {
        "mm.model.fc.weight": (INSIDE, WIDTH), **norms_of("mm.post_fc_norm", size=INSIDE),
        "mm.up.weight": (FFN, INSIDE), "mm.gate.weight": (FFN, INSIDE), "mm.down.weight": (out, FFN),
        "v.boi": (out,), "v.eoi": (out,),
    }  # fmt: skip
    return write(path, TOWER | {"clip.projector_type": "cogvlm", "clip.vision.image_size": 48}, shapes)


def write_gemma3n(path: Path, out: int = 64) -> Path:
    """MobileNetV5 of four stages and a block of attention: of 64 pixels 4 x 4 rows."""
    shapes: Shapes = {
        "v.conv_stem.conv.weight": (8, 3, 3, 3), "v.conv_stem.conv.bias": (1, 8, 1, 1), "v.conv_stem.bn.weight": (8,),
        "v.blk.0.0.conv_exp.weight": (16, 8, 3, 3), "v.blk.0.0.bn1.weight": (16,),
        "v.blk.0.0.conv_pwl.weight": (8, 16, 1, 1), "v.blk.0.0.bn2.weight": (8,),
    }  # fmt: skip
    for stage in (1, 2, 3):
        shapes |= {
            f"v.blk.{stage}.0.pw_exp.conv.weight": (16, 8, 1, 1), f"v.blk.{stage}.0.pw_exp.bn.weight": (16,),
            f"v.blk.{stage}.0.dw_mid.conv.weight": (16, 1, 3, 3), f"v.blk.{stage}.0.dw_mid.bn.weight": (16,),
            f"v.blk.{stage}.0.pw_proj.conv.weight": (8, 16, 1, 1), f"v.blk.{stage}.0.pw_proj.bn.weight": (8,),
        }  # fmt: skip
    shapes |= {
        "v.blk.3.1.norm.weight": (8,), "v.blk.3.1.attn.query.proj.weight": (16, 8, 1, 1),
        "v.blk.3.1.attn.key.proj.weight": (8, 8, 1, 1), "v.blk.3.1.attn.value.proj.weight": (8, 8, 1, 1),
        "v.blk.3.1.attn.output.proj.weight": (8, 16, 1, 1),
        "v.msfa.ffn.pw_exp.conv.weight": (FFN, 16, 1, 1), "v.msfa.ffn.pw_exp.bn.weight": (FFN,),
        "v.msfa.ffn.pw_proj.conv.weight": (out, FFN, 1, 1), "v.msfa.ffn.pw_proj.bn.weight": (out,),
        "v.msfa.norm.weight": (out,), "mm.input_projection.weight": (out, out), "mm.soft_emb_norm.weight": (out,),
    }  # fmt: skip
    # llama.cpp takes image_size / patch_size for the number of rows, and the tower's width for theirs.
    keys = {"clip.projector_type": "gemma3nv", "clip.vision.image_size": 64, "clip.vision.patch_size": 4,
            "clip.vision.embedding_length": out}  # fmt: skip
    return write(path, TOWER | keys, shapes, half=("dw_mid.conv",))


def write_gemma4(path: Path, out: int = 64) -> Path:
    """Any size, RMS norms, positions by row and column, three by three patches averaged to a row."""
    shapes: Shapes = {"v.patch_embd.weight": PATCHES["v.patch_embd.weight"], "v.position_embd.weight": (2, 128, WIDTH)}
    for number in range(BLOCKS):
        one = {name: shape for name, shape in block_of(number, ("q", "k", "v")).items() if name.endswith("weight")}
        shapes |= one | {f"v.blk.{number}.ffn_gate.weight": (FFN, WIDTH)}
        shapes |= {f"v.blk.{number}.attn_{part}_norm.weight": (WIDTH // HEADS,) for part in "qk"}
    shapes["mm.input_projection.weight"] = (out, WIDTH)
    return write(path, TOWER | {"clip.projector_type": "gemma4v", "clip.vision.image_size": 96}, shapes)


def write_deepseek4v(path: Path, out: int = 64) -> Path:
    """Any size, RMS norms, three by three patches to a row, learned rows around, after each line and as padding."""
    shapes: Shapes = dict(PATCHES)
    for number in range(BLOCKS):
        one = {name: shape for name, shape in block_of(number, ("q", "k", "v")).items() if name.endswith("weight")}
        shapes |= one | {f"v.blk.{number}.ffn_gate.weight": (FFN, WIDTH)}
    shapes |= {
        "mm.1.weight": (INSIDE, 9 * WIDTH), "mm.1.bias": (INSIDE,), "mm.2.weight": (out, INSIDE), "mm.2.bias": (out,),
        "v.image_newline": (out,), **{f"v.token_embd.img_{part}": (out,) for part in ("start", "end", "pad")},
    }  # fmt: skip
    keys = {
        "clip.projector_type": "deepseek4v", "clip.use_silu": True, "clip.vision.image_size": 96,
        "clip.vision.projector.scale_factor": 3, "clip.vision.image_min_pixels": 12 * (3 * PATCH) ** 2,
    }  # fmt: skip
    return write(path, TOWER | keys, shapes)


def write_hunyuanvl(path: Path, out: int = 64) -> Path:
    """Any size, two by two patches convolved to a row, learned rows around and after each line."""
    shapes: Shapes = {**PATCHES, "v.position_embd.weight": (64, WIDTH)}
    for number in range(BLOCKS):
        shapes |= block_of(number, ("q", "k", "v"))
    shapes |= {
        "mm.pre_norm.weight": (WIDTH,), "mm.0.weight": (INSIDE, WIDTH, 2, 2), "mm.0.bias": (INSIDE,),
        "mm.2.weight": (FFN, INSIDE, 1, 1), "mm.2.bias": (FFN,), "v.image_newline": (FFN,),
        "mm.model.fc.weight": (out, FFN), "mm.model.fc.bias": (out,), "mm.image_begin": (out,),
        "mm.image_end": (out,), "mm.post_norm.weight": (out,),
    }  # fmt: skip
    keys = {
        "clip.projector_type": "hunyuanvl", "clip.use_gelu": True, "clip.vision.image_size": 64,
        "clip.vision.image_min_pixels": 16 * (2 * PATCH) ** 2, "clip.vision.image_max_pixels": 60 * (2 * PATCH) ** 2,
    }  # fmt: skip
    return write(path, TOWER | keys, shapes)
