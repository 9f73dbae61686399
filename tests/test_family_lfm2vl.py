"""LFM2-VL against transformers, on a tiny model as two GGUF files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from edge_tokcomp.errors import ImageError, TokcompError, UsageError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.families import TowerSpec, family_for, family_named
from edge_tokcomp.families.base import Part, Pixels
from edge_tokcomp.families.lfm2vl import _is_large, _nearest_grid
from edge_tokcomp.families.pictures import fit_area
from family_proof import (
    Proof,
    assert_same_rows,
    assert_same_text,
    assert_same_when_rows_are_dropped,
    error,
    our_greedy,
    photo,
)
from hf_mmproj import write_mmproj_of
from hf_processors import make_processor, make_tokenizer
from hf_vlms import FAMILIES, build
from mtmd_pieces import both_pieces, rows, texts

SINGLE = ((256, 256), (100, 60), (300, 200), (91, 400), (650, 700))
TILED = (1100, 500)
FAMILY = family_named("lfm2vl")


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make("lfm2vl", tmp_path_factory.mktemp("lfm2vl"))


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor("lfm2vl", make_tokenizer("lfm2vl"), FAMILIES["lfm2vl"].preprocessor)


def patches(crop: NDArray[np.float32], side: int = 16) -> NDArray[np.float32]:
    """A crop as the processor lays it out: patches in raster order, of each its pixels, of these the colours."""
    _, height, width = crop.shape
    cells = crop.reshape(3, height // side, side, width // side, side).transpose(1, 3, 2, 4, 0)
    return cells.reshape(-1, side * side * 3)


def written(parts: tuple[Part, ...], pixels: Pixels) -> str:
    """The processor's spelling of ``parts``: an image token for every row."""
    return "".join(
        part if isinstance(part, str) else "<image>" * sum(math.prod(pixels.grids[crop]) for crop in part)
        for part in parts
    )


def their_text(processor: Any, image: Image.Image, **options: Any) -> tuple[str, Any]:
    found = processor.image_processor([[image]], return_row_col_info=True, return_tensors="np", **options)
    return processor.replace_image_token(found, 0, use_image_special_tokens=True, **options), found


@pytest.mark.parametrize("size", [*SINGLE, TILED, (500, 1300)])
def test_pixels_and_text_are_the_processors(proof: Proof, processor: Any, size: tuple[int, int]) -> None:
    text, theirs = their_text(processor, photo(*size))
    pixels = proof.family.preprocess(photo(*size), proof.spec)
    assert written(proof.family.prompt(pixels), pixels) == text
    assert [(2 * rows, 2 * columns) for rows, columns in pixels.grids] == list(map(tuple, theirs["spatial_shapes"]))
    for crop, values, mask in zip(pixels.crops, theirs["pixel_values"], theirs["pixel_attention_mask"], strict=True):
        np.testing.assert_allclose(patches(crop), values[mask == 1], atol=1e-5)


def test_pictures_of_all_sizes_are_cut_as_the_processor_cuts_them(proof: Proof, processor: Any) -> None:
    theirs, spec = processor.image_processor, proof.spec
    sizes = np.random.default_rng(0).integers(1, 4000, (1500, 2)).tolist()
    # Rounding half a token, and proportions as near to one grid as to another.
    sizes += [[16 * a, 16 * b] for a in range(1, 150, 3) for b in (1, 17, 47, 64)] + [[1200, 700], [700, 1200]]
    for height, width in sizes:
        image = Image.new("L", (width, height))
        large = theirs._is_image_too_large(height, width, 256, 16, 2, 2.0)
        assert _is_large(image, spec) == large
        columns, grid_rows, *_ = theirs._get_grid_layout(height, width, 2, 10, 512)
        assert _nearest_grid(height, width, spec.limits) == (grid_rows, columns)
        wide, tall = theirs.smart_resize(height, width, 2, 64, 256, 16)
        assert fit_area(height, width, 32, 64 * 32**2, 256 * 32**2, shortest=32) == (tall, wide)


@pytest.mark.parametrize("size", [*SINGLE, TILED])
def test_rows_are_those_of_tower_and_projector(proof: Proof, size: tuple[int, int]) -> None:
    asked = proof.asked([photo(*size)], "q")
    with torch.no_grad():
        out = proof.model.get_image_features(
            asked["pixel_values"], asked["spatial_shapes"], asked["pixel_attention_mask"]
        )
    assert_same_rows(proof, photo(*size), torch.cat([*out.pooler_output], 0).numpy())


@pytest.mark.parametrize("size", [(100, 60), (300, 200), (91, 400), TILED])
def test_prompt_and_picture_give_the_same_text(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_text(proof, [photo(*size)], tokens=6)


def test_two_pictures_stand_behind_one_another(proof: Proof) -> None:
    assert_same_text(proof, [photo(90, 60), photo(60, 100, seed=1)], "which is larger")


@pytest.mark.parametrize("size", [(300, 200), TILED])
def test_kept_rows_follow_one_another(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_when_rows_are_dropped(proof, photo(*size))


def test_further_questions_fork_the_prompt_up_to_the_picture(proof: Proof) -> None:
    """The convolutions' state cannot be cut back: what is asked must run on a copy of the sequence."""
    picture = photo(300, 200)
    with proof.open() as vlm:
        assert vlm.model.recurrent
        encoded = vlm.encode(picture)
        our_greedy(vlm, [encoded], "what is this", 4)
        held, fed = vlm.asker._held, []
        decode = vlm.decoder.decode
        vlm.decoder.decode = lambda batch, **options: (fed.append(sum(map(len, batch))), decode(batch, **options))[1]
        said, logits = our_greedy(vlm, [encoded], "how many", 4)
        assert vlm.asker._held is held
    theirs, wanted = proof.greedy([picture], "how many", 4)
    assert said == theirs
    assert error(logits, wanted) <= 5e-3
    assert fed[0] < len(encoded.rows)  # the question alone
    assert fed[1:] == [1, 1, 1]


def test_lfm25_has_no_norm_before_its_projector(proof: Proof, tmp_path: Path) -> None:
    model = build("lfm2vl")
    projector = model.model.multi_modal_projector
    projector.use_layer_norm, projector.layer_norm = False, None
    newer = replace(proof, model=model, mmproj=write_mmproj_of(model, "lfm2vl", tmp_path / "m.gguf"))
    assert [step.kind for step in newer.spec.projector] == ["linear", "gelu", "linear"]
    assert_same_text(newer, [photo(300, 200)], tokens=4)


def test_files_may_say_how_large_and_how_many_crops_are(proof: Proof, processor: Any) -> None:
    file = Mmproj(proof.mmproj)
    once = {"clip.vision.preproc_min_tiles": 1, "clip.vision.preproc_max_tiles": 1}
    few = {"clip.vision.preproc_max_tiles": 4, "clip.vision.image_max_pixels": 128 * 1024}
    picture = photo(1300, 400)
    for changes, options in ((once, {"do_image_splitting": False}), (few, {"max_tiles": 4, "max_image_tokens": 128})):
        pixels = proof.family.preprocess(picture, proof.family.spec(file.metadata | changes, file.shapes))
        assert written(proof.family.prompt(pixels), pixels) == their_text(processor, picture, **options)[0]


@pytest.mark.parametrize("size", [(256, 256), (300, 200), (91, 400), (1200, 800)])
def test_llama_cpp_reads_the_same_crops_and_markers(proof: Proof, size: tuple[int, int]) -> None:
    """Tiles too, where the picture has the proportions of their grid: 1200 x 800 is 3 x 2 tiles."""
    ours, theirs = both_pieces(proof, photo(*size))
    assert texts(ours) == texts(theirs)
    for own, other in zip(rows(ours), rows(theirs), strict=True):
        assert error(other, own) <= 5e-3


def test_llama_cpp_keeps_the_proportions_of_a_tiled_picture_on_black(proof: Proof) -> None:
    """libmtmd (tools/mtmd/clip-model.h, image_pad_rf is PAD_CEIL) pads what it cuts tiles from; transformers stretches.
    ggml-org/llama.cpp pull request 17577 took padding away for single crops, issue 17290 is still open."""
    picture = photo(1200, 700)
    ours, theirs = both_pieces(proof, picture)
    assert texts(ours) == texts(theirs)
    assert error(rows(theirs)[-1], rows(ours)[-1]) <= 5e-3  # the thumbnail
    black = Image.new("RGB", (3 * 512, 2 * 512))
    black.paste(picture.resize((1536, 896), Image.Resampling.BILINEAR), (0, 64))
    padded, _ = both_pieces(proof, black)
    for own, other, boxed in zip(rows(ours)[:-1], rows(theirs)[:-1], rows(padded)[:-1], strict=True):
        assert error(other, own) > 0.1
        assert error(other, boxed) <= 5e-3


def test_llama_cpp_rounds_half_a_token_up(proof: Proof) -> None:
    """libmtmd (tools/mtmd/mtmd-image.cpp, calc_size_preserved_ratio); pull request 27057 mended the same in deciding
    whether to tile. 272 pixels are 8.5 tokens, of which Python's ``round`` makes 8."""
    ours, theirs = both_pieces(proof, photo(272, 272))
    assert [len(rows(pieces)[0]) for pieces in (ours, theirs)] == [64, 81]


def published(model: str) -> TowerSpec:
    width, heads, ffn, blocks = {"450M": (768, 12, 3072, 12), "1.6B": (1152, 16, 4304, 26)}[model]
    metadata = {
        "clip.vision.image_size": 256, "clip.vision.patch_size": 16, "clip.vision.embedding_length": width,
        "clip.vision.attention.head_count": heads, "clip.vision.feed_forward_length": ffn,
        "clip.vision.block_count": blocks, "clip.vision.projector.scale_factor": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3,
    }  # fmt: skip
    shapes = {f"v.blk.{block}.ln1.weight": (width,) for block in range(blocks)}
    return FAMILY.spec(metadata, shapes | {"v.position_embd.weight": (256, width)})


@pytest.mark.parametrize("model", ["450M", "1.6B"])
@pytest.mark.parametrize(
    ("size", "tokens"), [((640, 480), (13 * 18,)), ((64, 64), (64,)), ((1920, 1080), (*[256] * 8, 12 * 21))]
)
def test_published_models_have_the_processors_tokens(
    processor: Any, model: str, size: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    spec, image = published(model), photo(*size)
    pixels = FAMILY.preprocess(image, spec)
    text, _ = their_text(processor, image)
    assert written(FAMILY.prompt(pixels), pixels) == text
    assert tuple(math.prod(grid) for grid in pixels.grids) == tokens
    assert len(FAMILY.layout(pixels, spec)) == text.count("<image>")


def test_the_thumbnail_comes_last_and_methods_know_it(proof: Proof) -> None:
    pixels = proof.family.preprocess(photo(*TILED), proof.spec)
    assert proof.family.layout(pixels, proof.spec).overview == len(pixels.crops) - 1 == 2
    alone = proof.family.preprocess(photo(300, 200), proof.spec)
    assert proof.family.layout(alone, proof.spec).overview is None


@pytest.mark.parametrize("size", [(1, 20_000), (60_000, 1)])
def test_a_sliver_is_refused(proof: Proof, size: tuple[int, int]) -> None:
    # transformers makes more patches of it than its mask has places for.
    with pytest.raises(ImageError, match=rf"picture of {size[0]}x{size[1]} pixels: .* at most 256; cut it"):
        proof.family.preprocess(Image.new("RGB", size), proof.spec)


def test_a_lower_resolution_is_refused(proof: Proof) -> None:
    with pytest.raises(UsageError, match="lfm2vl cuts pictures into crops of several"):
        proof.open(method="resolution", keep=4)
    with pytest.raises(UsageError, match="lfm2vl sizes pictures"):
        proof.family.preprocess(photo(64, 64), proof.spec, (2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.vision.projector.scale_factor": 3}, "3 by 3 patches of 16 do not divide a tile of 512"),
        ({"clip.vision.projector.scale_factor": 0}, "scale_factor 0"),
        ({"clip.vision.patch_size": 0}, "patch_size 0"),
        ({"clip.vision.projector.scale_factor": None}, "scale_factor is missing"),
        ({"clip.vision.image_max_pixels": 1 << 30}, "65536 to 1073741824 pixels"),
        ({"clip.vision.image_min_pixels": 0}, "image_min_pixels 0"),
        ({"clip.vision.image_min_pixels": 1, "clip.vision.image_max_pixels": 1000}, "1 to 1000 pixels"),
        ({"clip.vision.preproc_min_tiles": 11}, "11 to 10 tiles"),
        ({"clip.vision.preproc_max_tiles": 100_000}, "2 to 100000 tiles"),
        ({"clip.vision.attention.head_count": 7}, "not a multiple of its 7 heads"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "m.gguf"
    mmproj = Mmproj(write_mmproj_of(build("lfm2vl"), "lfm2vl", path, edit=lambda keys: keys.update(changes)))
    with pytest.raises(TokcompError, match=message) as fault:
        family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    assert "\n" not in str(fault.value)
