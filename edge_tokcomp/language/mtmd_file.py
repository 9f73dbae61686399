"""What an mmproj GGUF must hold before libmtmd is given it, checked in its header.

libmtmd refuses a file that lacks a tensor it asks for. It ends the process over a tensor of another shape or type, a
value of another type, and sizes it cannot compute with (``clip.cpp`` and ``models/*.cpp`` of llama-cpp-python 0.3.36).
Of towers that are plain vision transformers the blocks are checked, of projectors that are plain matrices these; of
all others only how wide their rows are.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError
from .gguf_header import GgufHeader, read_header

Shape = tuple[int, ...]

# fmt: off
_WIDTH_AT = {
    ("mm.2.weight", 1): "mlp mimovl muse-glimmer phi4 pixtral lightonocr dots_ocr dots3note_v lfm2 kimivl kimik25 "
                        "paddleocr yasa2 deepseek4v",
    ("mm.2.bias", 0): "qwen2vl_merger qwen2.5vl_merger qwen2.5o qwen3vl_merger ling3vl exaone4_5 youtuvl",
    ("mm.3.bias", 0): "mlp_norm",
    ("mm.1.bias", 0): "janus_pro",
    ("mm.down.weight", 1): "minicpmv4_6 glm4v glm5v cogvlm",
    ("mm.input_projection.weight", 0): "gemma3 gemma3nv",
    ("mm.input_projection.weight", 1): "gemma4v gemma4uv",
    ("mm.merger.fc2.bias", 0): "minimax_m3",
    ("mm.model.fc.weight", 1): "idefics3 llama4 step3vl deepseekocr deepseekocr2 hunyuanvl",
    ("mm.model.mb_block.2.block.2.1.bias", 0): "ldp",
    ("mm.model.mlp.3.weight", 1): "internvl nemotron_v2_vl",
    ("mm.model.peg.0.bias", 0): "ldpv2",
    ("resampler.proj.weight", 0): "resampler",
    ("adapter.linear.dense_4h_to_h.weight", 1): "adapter",
    ("model.image_newline", 0): "granite4_vision",
}
"""Projector types that can be served, by the tensor and its axis that tell how wide their rows are."""

_NEEDED = {
    "v.patch_embd.weight.1": "qwen2vl_merger qwen2.5vl_merger qwen2.5o qwen3vl_merger ling3vl exaone4_5 glm4v glm5v "
                             "mimovl minimax_m3",
    "v.patch_embd.bias": "qwen3vl_merger glm4v glm5v",
    "v.class_embd": "internvl nemotron_v2_vl cogvlm llama4",
    "v.position_embd.weight": "mlp mlp_norm ldp ldpv2 adapter resampler minicpmv4_6 idefics3 gemma3 internvl lfm2 "
                              "nemotron_v2_vl qwen3vl_merger cogvlm llama4 kimivl kimik25 granite4_vision hunyuanvl",
    "v.blk.0.attn_qkv.weight": "cogvlm", "v.blk.0.attn_qkv.bias": "cogvlm",
    "v.blk.0.attn_q.bias": "qwen2vl_merger qwen2.5vl_merger qwen2.5o youtuvl",
    "mm.0.weight": "mlp mlp_norm", "mm.0.bias": "mlp mlp_norm", "mm.2.bias": "mlp",
}
"""Tensors without which libmtmd loads a file, and crashes or computes something else."""

_OTHER_TOWERS = {
    "gemma3nv", "gemma4uv", "yasa2", "deepseekocr", "deepseekocr2", "dots3note_v", "mimovl", "muse-glimmer",
}
"""No vision transformers of one width whose blocks are all alike."""
_TILES = {
    "mlp", "mlp_norm", "ldp", "ldpv2", "adapter", "resampler", "idefics3", "gemma3", "internvl", "llama4",
    "nemotron_v2_vl", "janus_pro", "cogvlm",
}
"""Whose tower sees squares of ``image_size`` only."""
_MERGED_BY_TWO = {*_NEEDED["v.patch_embd.weight.1"].split(), "hunyuanvl"}
"""Of which llama.cpp takes two by two patches for a token, whatever the file says."""
_TURNED = {*_NEEDED["v.patch_embd.weight.1"].split(), "pixtral", "lightonocr", "deepseek4v"}
"""With rotary positions in the tower."""
_LOOKED_UP = {"mlp", "mlp_norm", "ldp", "ldpv2", "adapter", "resampler", "minicpmv4_6"}
"""Whose positions are looked up in their table."""
_BUCKETS = 70 * 70
"""Rows of MiniCPM-V's table of positions, into which those of any picture fall."""
_ADDED = {"idefics3": 0, "gemma3": 0, "internvl": 1, "cogvlm": 1}
"""Whose table of positions is added as it is, and its rows beyond those of the patches."""
_STRETCHED = {"lfm2", "qwen3vl_merger", "hunyuanvl"}
"""Whose table of positions is a square, stretched over the patches."""
_CHAINS = {
    "mlp": ("mm.0", "mm.2"), "qwen2vl_merger": ("mm.0", "mm.2"), "qwen2.5vl_merger": ("mm.0", "mm.2"),
    "qwen2.5o": ("mm.0", "mm.2"),
    "qwen3vl_merger": ("mm.0", "mm.2"), "pixtral": ("mm.1", "mm.2"), "lfm2": ("mm.1", "mm.2"),
    "idefics3": ("mm.model.fc",), "internvl": ("mm.model.mlp.1", "mm.model.mlp.3"),
    "cogvlm": ("mm.model.fc", "mm.up", "mm.down"), "hunyuanvl": ("mm.0", "mm.2", "mm.model.fc"),
    "deepseek4v": ("mm.1", "mm.2"),
}
"""Projectors that are matrices, one after another; HunyuanVL's first is one of two by two patches."""
_LEARNED = {
    "cogvlm": ("v.boi", "v.eoi"), "hunyuanvl": ("mm.image_begin", "mm.image_end", "mm.post_norm"),
    "deepseek4v": ("v.image_newline", *(f"v.token_embd.img_{part}" for part in ("start", "end", "pad"))),
}
"""Vectors as wide as what the projector writes."""

_ROW_BREAK = {"pixtral": "v.token_embd.img_break", "deepseek4v": "v.image_newline"}

_MOST_BLOCKS, _MOST_PATCHES, _MOST_TILES = 512, 1 << 16, 64
_RANGES = {
    "embedding_length": (1, 1 << 16), "block_count": (0, _MOST_BLOCKS), "attention.head_count": (1, 1 << 10),
    "attention.head_count_kv": (1, 1 << 10), "attention.head_dim": (0, 1 << 12), "patch_size": (1, 1 << 10),
    "image_size": (0, 1 << 13), "image_min_pixels": (1, 1 << 28), "image_max_pixels": (1, 1 << 28),
    "preproc_image_size": (1, 1 << 14), "preproc_min_tiles": (0, 1 << 8), "preproc_max_tiles": (1, 1 << 8),
    "projector.scale_factor": (1, 1 << 6), "spatial_merge_size": (1, 1 << 6), "window_size": (0, 1 << 12),
    "n_wa_pattern": (0, _MOST_BLOCKS), "projector.query_side": (1, 1 << 10), "projector.window_side": (1, 1 << 10),
    "sam.head_count": (1, 1 << 10), "sam.block_count": (1, _MOST_BLOCKS), "sam.embedding_length": (1, 1 << 16),
}
"""Least and most of the numbers under ``clip.vision``, generously."""
_ALWAYS = ("embedding_length", "block_count", "attention.head_count", "patch_size", "image_size")

_KINDS = {4: "32-bit number", 5: "signed 32-bit number", 6: "32-bit float", 7: "truth value", 8: "text"}
_VALUES = {
    **{
        f"clip.{part}.{name}": 4 for part in ("vision", "audio")
        for name in (*_RANGES, "feed_forward_length", "projection_dim", "expert_used_count")
    },
    **{f"clip.{part}.attention.layer_norm_epsilon": 6 for part in ("vision", "audio")},
    **{f"clip.{name}": 7 for name in ("has_vision_encoder", "has_audio_encoder", "has_gen_audio_encoder")},
    **{f"clip.{part}projector_type": 8 for part in ("", "vision.", "audio.")},
    "clip.minicpmv_version": 5, "clip.minicpmv_query_num": 4, "clip.vision.swiglu_clamp": 6, "clip.use_gelu": 7,
    "clip.use_silu": 7, "clip.vision.mm_patch_merge_type": 8, "general.name": 8, "general.description": 8,
}
"""GGUF types of what libmtmd reads; it ends the process over another."""
# fmt: on

_YI = "mlp_norm"
"""What llama.cpp calls the projector of Yi-VL, whose files say ``mlp``."""
_F32, _INT32 = 0, 5
_BLOCK = re.compile(r"v\.blk\.(\d+)\.(.+)")
_LEVEL = re.compile(r"(v\.deepstack\.\d+)\.fc1\.weight")


@dataclass(frozen=True, eq=False)
class Projector:
    """``kind``: its type, as the file names it. ``width``: of the rows it writes. ``image_size``: of a tile, or 0.

    ``row_break (width,) float32``: the row that Pixtral and DeepSeek-V4 put after each line of a picture.
    """

    kind: str
    width: int
    image_size: int
    row_break: NDArray[np.float32] | None


def served_projectors() -> set[str]:
    """The projector types, as files name them, that can be used."""
    return {form for forms in _WIDTH_AT.values() for form in forms.split()} - {_YI}


def check_projector(path: str | os.PathLike[str]) -> Projector:
    """Read the header of an mmproj; raises ``TokcompError`` in one line for a file that libmtmd cannot use."""
    header = read_header(path)
    if header.text("general.architecture") != "clip":
        raise TokcompError(
            f"{path}: architecture {header.text('general.architecture')!r} is no vision tower; name the mmproj file"
        )
    _check_values(header)
    if not header.metadata.get("clip.has_vision_encoder"):
        raise TokcompError(f"{path}: holds no vision tower, as an mmproj for audio does; name the one for images")
    kind = header.text("clip.projector_type") or header.text("clip.vision.projector_type")
    form = _YI if kind == "mlp" and "mm.3.weight" in header.tensors else kind
    place = next((place for place, forms in _WIDTH_AT.items() if form in forms.split()), None)
    if place is None:
        raise TokcompError(f"{path}: projector type {kind!r} is unknown to the installed llama.cpp; it cannot be used")
    file = _File(header, form)
    file.check_sizes()
    file.check_needed(place[0])
    file.check_vectors()
    if form not in _OTHER_TOWERS:
        file.check_blocks()
    if form not in _OTHER_TOWERS or form == "gemma3nv":
        file.check_ends()
    return Projector(
        kind, file.shapes[place[0]][place[1]] * file.slices, file.number("image_size"), _row_break(header, form)
    )


def _check_values(header: GgufHeader) -> None:
    with header.path.open("rb") as stream:
        for key, wanted in _VALUES.items():
            if key in header.spans:
                stream.seek(header.spans[key][0] + 8 + len(key))
                (found,) = struct.unpack("<I", stream.read(4))
                if found != wanted:
                    raise _fault(header, f"{key} is no {_KINDS[wanted]} (GGUF type {found})")


class _File:
    """The header of a file whose projector is of a known ``form``; shapes as stored, what goes in first."""

    def __init__(self, header: GgufHeader, form: str) -> None:
        self.header, self.form = header, form
        self.shapes = {name: _squeezed(tensor.shape) for name, tensor in header.tensors.items()}
        self.levels = {match[1] for name in header.tensors if (match := _LEVEL.fullmatch(name))}
        self.features = max(1, header.arrays.get("clip.vision.feature_layer", 1))

    def number(self, name: str, default: int = 0) -> int:
        """A number under ``clip.vision``."""
        return int(self.header.number(f"clip.vision.{name}", default))

    @property
    def merge(self) -> int:
        """Patches a side that become one token."""
        usual = 2 if self.form in _MERGED_BY_TWO else 4 if self.form == "gemma3" else 1
        return self.number("spatial_merge_size", self.number("projector.scale_factor", usual))

    @property
    def slices(self) -> int:
        """Rows side by side in one: Qwen3-VL and Granite add those of further layers of the tower."""
        if self.form == "qwen3vl_merger":
            return 1 + len(self.levels)
        return self.features if self.form == "granite4_vision" else 1

    def check_sizes(self) -> None:
        """Numbers that libmtmd computes with."""
        for name in _ALWAYS:
            if f"clip.vision.{name}" not in self.header.metadata:
                raise self._fault(f"clip.vision.{name} is missing")
        for name, (least, most) in _RANGES.items():
            if not least <= self.number(name, least) <= most:
                raise self._fault(f"clip.vision.{name} is {self.number(name)}, not {least} to {most}")
        if not self.header.number("clip.vision.attention.layer_norm_epsilon", 0) >= 0:  # nor what is no number
            raise self._fault("clip.vision.attention.layer_norm_epsilon is below 0")
        side, patch = self.number("image_size"), self.number("patch_size")
        if (side // patch) ** 2 > _MOST_PATCHES:
            raise self._fault(f"image_size {side} in patches of {patch} makes more than {_MOST_PATCHES} patches")
        if self.form in _TILES and (side < patch or side // patch % self.merge):
            raise self._fault(f"image_size {side} in patches of {patch} cannot be merged {self.merge} by {self.merge}")
        if self.form in _MERGED_BY_TWO and self.merge != 2:
            raise self._fault(f"{self.merge} by {self.merge} patches are to be a token, llama.cpp takes 2 by 2")
        least, most = self.number("preproc_min_tiles", 1), self.number("preproc_max_tiles", 12)
        if least > most or (self.form == "internvl" and not 1 <= least**2 <= most):
            raise self._fault(f"preproc_min_tiles {least} does not go with preproc_max_tiles {most}")
        sides = _integers(self.header, "clip.vision.image_grid_pinpoints")
        if any(not 0 < each <= _MOST_TILES * side or each % side for each in sides):
            raise self._fault(f"clip.vision.image_grid_pinpoints are not all in tiles of image_size {side}")

    def check_needed(self, tells_width: str) -> None:
        """Tensors that have to be there."""
        needed = [tells_width, *(name for name, forms in _NEEDED.items() if self.form in forms.split())]
        if self.form not in _OTHER_TOWERS:
            needed.append("v.patch_embd.weight")
        if self.form in ("pixtral", "lightonocr") and self.merge > 1:
            needed += ["mm.patch_merger.weight", "mm.input_norm.weight"]
        for level in sorted(self.levels):
            needed += [f"{level}.{part}.{kind}" for part in ("norm", "fc1", "fc2") for kind in ("weight", "bias")]
        for name in needed:
            if name not in self.shapes:
                raise self._fault(f"tensor {name} is missing")

    def check_vectors(self) -> None:
        """What is added or multiplied with is in 32-bit floats; a bias is as long as its matrix gives values."""
        for name, shape in self.shapes.items():
            learned = name in _LEARNED.get(self.form, ())
            plain = learned or (len(shape) == 1 and name.endswith((".bias", ".weight", "_embd", "_break", "_newline")))
            plain |= name == "v.position_embd.weight" and self.form not in _LOOKED_UP
            if plain and self.header.tensors[name].type_id != _F32:
                raise self._fault(f"tensor {name} is {self.header.tensors[name].type_name}, not F32")
            weight = self.shapes.get(f"{name.removesuffix('.bias')}.weight")
            if name.endswith(".bias") and weight is not None and shape != weight[-1:]:
                raise self._fault(f"tensor {name} is {shape}, its weight {weight}")

    def check_blocks(self) -> None:
        """All blocks have the same tensors, and these fit together."""
        blocks: dict[int, dict[str, Shape]] = {}
        for name, shape in self.shapes.items():
            if match := _BLOCK.fullmatch(name):
                blocks.setdefault(int(match[1]), {})[match[2].removesuffix(".weight")] = shape
        count, first = self.number("block_count"), blocks.get(0, {})
        if not count:
            raise self._fault("clip.vision.block_count is 0")
        for number in range(count):
            block = blocks.get(number, {})
            for part in sorted(first.keys() | block.keys()):
                if part not in first or part not in block:
                    raise self._fault(f"tensor {part} is missing in some of {count} blocks")
                if first[part] != block[part]:
                    raise self._fault(f"tensor {part} is {block[part]} in block {number}, {first[part]} in block 0")
        queries = ("attn_qkv",) if "attn_qkv" in first else ("attn_q", "attn_k", "attn_v")
        for part in ("attn_out", "ffn_up", "ffn_down", *queries):
            if part not in first:
                raise self._fault(f"tensor v.blk.0.{part}.weight is missing")
        self._require({f"v.blk.0.{part}": shape for part, shape in self._block(first).items()})

    def check_ends(self) -> None:
        """What comes before and after the blocks, as far as it is alike in many files."""
        width, patch = self.number("embedding_length"), self.number("patch_size")
        wanted: dict[str, Shape] = dict.fromkeys(("v.pre_ln", "v.post_ln"), (width,))
        for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
            if len(self.shapes.get(name, ())) == 4:
                wanted[name] = (patch, patch, 3, width)
        if self.form != "nemotron_v2_vl":  # which has several
            wanted["v.class_embd"] = (width,)
        if "v.position_embd.weight" in self.shapes:
            wanted["v.position_embd"] = self._table(width, (self.number("image_size") // patch) ** 2)
        square = width * self.merge**2
        into = width * self.features if self.form in ("mlp", "pixtral") else square
        for name in _CHAINS.get(self.form, ()):
            wanted[name] = (into, into := self.shapes.get(f"{name}.weight", (0,))[-1])
        wanted |= dict.fromkeys(_LEARNED.get(self.form, ()), (into,))
        if self.form == "cogvlm":
            wanted |= {"mm.post_fc_norm": wanted["mm.up"][:1], "mm.gate": wanted["mm.up"]}
        if self.form == "hunyuanvl":
            wanted |= {"mm.0": (2, 2, width, wanted["mm.0"][1]), "v.image_newline": wanted["mm.2"][1:]}
            wanted["mm.pre_norm"] = (width,)
        if self.form == "pixtral":
            wanted |= {"mm.input_norm": (width,), "mm.patch_merger": (square, width), "v.token_embd.img_break": (into,)}
        if self.form == "gemma3":
            into = self.shapes["mm.input_projection.weight"][0]
            wanted |= {"mm.soft_emb_norm": (width,), "mm.input_projection": (into, width)}
        if self.form == "gemma3nv":
            # llama.cpp reads the width of the rows where that of the tower stands.
            wanted |= {"mm.soft_emb_norm": (width,), "mm.input_projection": (width, width)}
            side = -(-self.number("image_size") // 16)
            if (side > 16 and side % 16) or min(side, 16) ** 2 != self.number("image_size") // patch:
                size = self.number("image_size")
                raise self._fault(f"image_size {size} over patch_size {patch} is not the number of its rows")
        for level in self.levels:
            wanted |= {f"{level}.norm": (square,), f"{level}.fc1": (square, square), f"{level}.fc2": (square, into)}
        self._require(wanted)
        if self.form in ("qwen2.5vl_merger", "qwen2.5o"):
            windows, out = self.number("n_wa_pattern"), self.number("projection_dim")
            if windows == 1 or out != into:
                raise self._fault(f"n_wa_pattern {windows} and projection_dim {out} do not fit rows of {into}")

    def _block(self, block: dict[str, Shape]) -> dict[str, Shape]:
        """The shapes that a block's matrices should have."""
        width, heads = self.number("embedding_length"), self.number("attention.head_count")
        head = self.number("attention.head_dim") or width // heads
        if self.form in _TURNED and head % 4:
            raise self._fault(f"a head is {head} wide, which its rotary positions need in multiples of 4")
        keys = self.number("attention.head_count_kv", heads) * head
        # Old converters wrote the two linears under each other's name.
        up, down = ("ffn_down", "ffn_up") if block["ffn_down"][0] == width else ("ffn_up", "ffn_down")
        inside = block[up][-1]
        return {
            "attn_q": (width, heads * head), "attn_k": (width, keys), "attn_v": (width, keys),
            "attn_qkv": (width, heads * head + 2 * keys), "attn_out": (heads * head, width), "ln1": (width,),
            "ln2": (width,), up: (width, inside), down: (inside, width), "ffn_gate": (width, inside),
        }  # fmt: skip

    def _table(self, width: int, patches: int) -> Shape:
        """The shape that a table of positions should have."""
        shape = self.shapes["v.position_embd.weight"]
        if self.form in _ADDED:
            return width, patches + _ADDED[self.form]
        if self.form in _STRETCHED:
            return width, math.isqrt(shape[-1]) ** 2
        if self.form in _LOOKED_UP:
            rows = _BUCKETS if self.form in ("resampler", "minicpmv4_6") else patches + ("v.class_embd" in self.shapes)
            return width, max(shape[-1], rows)
        return width, *shape[1:]

    def _require(self, wanted: dict[str, Shape]) -> None:
        """Raise unless the tensors that are there, with or without ``.weight`` in their names, have these shapes."""
        for name, shape in wanted.items():
            for stored in (name, f"{name}.weight"):
                if stored in self.shapes and self.shapes[stored] != _squeezed(shape):
                    raise self._fault(f"tensor {stored} is {self.shapes[stored]}, its metadata asks for {shape}")

    def _fault(self, fault: str) -> TokcompError:
        return _fault(self.header, fault)


def _row_break(header: GgufHeader, form: str) -> NDArray[np.float32] | None:
    tensor = header.tensors.get(_ROW_BREAK.get(form, ""))
    if tensor is None:
        return None
    return np.fromfile(header.path, np.float32, math.prod(tensor.shape), offset=tensor.offset)


def _integers(header: GgufHeader, key: str) -> tuple[int, ...]:
    """An array of 32-bit integers, empty where the file has none; libmtmd itself refuses one of another type."""
    if key not in header.arrays:
        return ()
    with header.path.open("rb") as stream:
        stream.seek(header.spans[key][0] + 8 + len(key))
        _, item, count = struct.unpack("<IIQ", stream.read(16))
        return struct.unpack(f"<{count}i", stream.read(4 * count)) if item == _INT32 else ()


def _squeezed(shape: Shape) -> Shape:
    return tuple(extent for extent in shape if extent != 1)


def _fault(header: GgufHeader, fault: str) -> TokcompError:
    return TokcompError(f"{header.path}: {fault}; convert or download the file again")
