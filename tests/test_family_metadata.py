"""Metadata of any kind: every family takes it or refuses it in one line, before memory is taken."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.mmproj import Mmproj
from edge_tokcomp.families import family_for
from hf_mmproj import write_mmproj_of
from hf_vlms import FAMILIES, build

IMPOSSIBLE: tuple[Any, ...] = (
    -1, 0, 2**31 - 1, 2**63, 0.5, math.nan, math.inf, -math.inf, "x", "", [], [1, 2], [0.0, 0.0, 0.0],
    [math.nan] * 3, [1e300] * 3, ["x"] * 3, [True], True, False, None,
)  # fmt: skip
OPTIONAL = (
    "clip.rope.freq_base", "clip.use_silu", "clip.vision.feature_layer", "clip.vision.image_grid_pinpoints",
    "clip.vision.image_max_pixels", "clip.vision.image_min_pixels", "clip.vision.is_deepstack_layers",
    "clip.vision.mm_patch_merge_type", "clip.vision.n_wa_pattern", "clip.vision.preproc_image_size",
    "clip.vision.preproc_max_tiles", "clip.vision.preproc_min_tiles", "clip.vision.projector.scale_factor",
    "clip.vision.spatial_merge_size", "clip.vision.window_size",
)  # fmt: skip

Known = tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]


@pytest.fixture(scope="module", params=FAMILIES)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Name, metadata and tensors' shapes of the tiny model."""
    path = tmp_path_factory.mktemp(request.param) / "m.gguf"
    mmproj = Mmproj(write_mmproj_of(build(request.param), request.param, path))
    return request.param, dict(mmproj.metadata), dict(mmproj.shapes)


def test_any_value_is_taken_or_refused_in_one_line(known: Known) -> None:
    _, metadata, shapes = known
    faults: list[str] = []
    began = time.perf_counter()
    for key in sorted({*OPTIONAL, *(key for key in metadata if key.startswith("clip."))}):
        for value in IMPOSSIBLE:
            changed = metadata | {key: value}
            try:
                family_for(changed).spec(changed, shapes)
            except TokcompError as fault:
                faults.append(str(fault))
            except Exception as fault:
                raise AssertionError(f"{key} = {value!r}: {type(fault).__name__}: {fault}") from fault
    assert len(faults) > 100
    assert not [fault for fault in faults if "\n" in fault or len(fault) > 400]
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    "key",
    [
        "clip.vision.patch_size", "clip.vision.embedding_length", "clip.vision.attention.head_count",
        "clip.vision.attention.layer_norm_epsilon", "clip.vision.image_mean", "clip.vision.image_std",
    ],
)  # fmt: skip
def test_what_every_family_needs_must_be_possible(known: Known, key: str) -> None:
    _, metadata, shapes = known
    for value in IMPOSSIBLE:
        if (key, value) in (("clip.vision.attention.layer_norm_epsilon", 0.5), ("clip.vision.image_mean", [0.0] * 3)):
            continue
        with pytest.raises(TokcompError):
            family_for(metadata).spec(metadata | {key: value}, shapes)
    with pytest.raises(TokcompError, match=f"{key} is missing"):
        family_for(metadata).spec({name: given for name, given in metadata.items() if name != key}, shapes)


def test_tensors_without_axes_are_no_bug(known: Known) -> None:
    _, metadata, shapes = known
    for tensor in shapes:
        with contextlib.suppress(TokcompError):
            family_for(metadata).spec(metadata, shapes | {tensor: ()})


@pytest.mark.parametrize("known", ["qwen2vl", "qwen25vl", "qwen3vl"], indirect=True)
def test_as_many_tokens_are_allowed_as_the_published_processors_allow(known: Known) -> None:
    _, metadata, shapes = known
    key = "clip.vision.image_max_pixels"
    unit = metadata["clip.vision.patch_size"] * metadata.get("clip.vision.spatial_merge_size", 2)
    most = 16384 * unit**2
    assert family_for(metadata).spec(metadata | {key: most}, shapes).limits.max_pixels == most
    with pytest.raises(TokcompError, match=f"to {most + 1} pixels of a picture are not within {unit**2}"):
        family_for(metadata).spec(metadata | {key: most + 1}, shapes)
