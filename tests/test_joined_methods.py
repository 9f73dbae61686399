"""A method in the tower and one behind it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edge_tokcomp.cli import main
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.methods import METHODS, Joined, get_method, joined_form
from edge_tokcomp.methods.luvc import LUVC
from edge_tokcomp.methods.mosaic import Mosaic
from edge_tokcomp.methods.resolution import Resolution
from edge_tokcomp.methods.visionzip import VisionZip
from edge_tokcomp.models import DEMO_LM
from edge_tokcomp.tokens import Layout
from edge_tokcomp.variant import TowerVariant
from edge_tokcomp.vlm import load
from family_proof import Proof, photo
from made_up_images import image

SAMPLE = DEMO_LM.parent / "samples" / "scene-3.jpg"


@pytest.fixture(scope="module")
def vlm():
    with load(method="luvc+mosaic", keep=64, threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("luvc+mosaic", Joined(LUVC(), Mosaic())),
        ("luvc:leave=0.4+mosaic", Joined(LUVC(), Mosaic(), 0.4)),
        ("luvc:first=0.25,leave=0.4+mosaic:reach=2.0", Joined(LUVC(first=0.25), Mosaic(reach=2.0), 0.4)),
        ("resolution:leave=0.8+visionzip:block=-2", Joined(Resolution(), VisionZip(block=-2), 0.8)),
    ],
)  # fmt: skip
def test_two_methods_are_written_with_a_plus_and_read_back(text, method):
    assert get_method(text) == method
    assert str(method) == text
    assert get_method(method, leave=0.25) == get_method(text, leave=0.25)


def test_blanks_around_the_plus_do_not_matter():
    assert get_method(" luvc + mosaic ") == get_method("luvc+mosaic")


def test_further_options_are_those_of_the_pair():
    with pytest.raises(UsageError, match=r"method luvc\+mosaic has no option 'reach'; its options: leave"):
        get_method("luvc+mosaic", reach=2.0)


def test_what_is_listed_can_be_joined_and_nothing_else():
    form = joined_form()
    assert isinstance(get_method(form["example"]), Joined)
    assert form["options"] == {"leave": {"default": Joined.leave, "accepts": "a number"}}
    for first in METHODS:
        for then in METHODS:
            if first in form["first"] and then in form["then"]:
                assert get_method(f"{first}+{then}").name == f"{first}+{then}"
            else:
                with pytest.raises(UsageError, match="join one that acts in the tower"):
                    get_method(f"{first}+{then}")


def test_a_plus_within_a_number_joins_nothing():
    assert get_method("prunesid:groups=4") == get_method("prunesid:groups=+4")
    assert get_method("mosaic:reach=2e+0") == Mosaic(reach=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mosaic+luvc", "join one that acts in the tower or before it with one that chooses"),
        ("mosaic+uniform", "join one that acts"),
        ("luvc+none", "join one that acts"),
        ("luvc+luvc", "join one that acts"),
        ("luvc+mosaic+uniform", "join one that acts"),
        ("luvc:leave=1.0+mosaic", "leave must lie between 0 and 1"),
        ("luvc:leave=much+mosaic", "leave must be a number, got 'much'"),
        ("luvc:leave=0.5", "method luvc has no option 'leave'"),
        ("luvc+mosiac", r"unknown method 'mosiac' \(did you mean 'mosaic'"),
        ("luvc+", r"unknown method 'luvc\+'"),
        ("luvc:method=1+mosaic", "method luvc has no option 'method'"),
    ],
)
def test_what_cannot_be_joined_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        get_method(text)


def test_the_second_chooses_among_what_the_first_leaves(vlm):
    encoded, merged = vlm.encode(SAMPLE), vlm.compress(vlm.see(SAMPLE), get_method("luvc"), 0.75)
    assert encoded.tokens.layout.grids == merged.tokens.layout.grids == ((20, 21),)
    np.testing.assert_allclose(encoded.tokens.features, merged.tokens.features, atol=1e-5)
    plan = get_method("mosaic").compress(encoded.tokens, 64)
    np.testing.assert_array_equal(encoded.plan.keep, plan.keep)
    np.testing.assert_array_equal(encoded.plan.assign, plan.assign)
    assert str(encoded.plan) == "576 → 64 (11.1 %)"
    assert vlm.answer(encoded, max_tokens=4).tokens_after == 64 == vlm.engine.kept(vlm.method, 64)


def test_where_more_is_kept_than_the_tower_would_leave_it_leaves_that(vlm):
    seen = vlm.see(SAMPLE)
    assert len(vlm.compress(seen, get_method("luvc:leave=0.25+mosaic"), 400).plan) == 400 == 20 * 20
    assert vlm.engine.kept(get_method("luvc:leave=0.25+mosaic"), 401) == 400
    assert vlm.compress(seen, vlm.method, 1.0).variant == TowerVariant(block=vlm.engine.spec.block(None))


def test_the_second_sees_the_attention_of_the_merged_patches(vlm):
    attending = vlm.compress(vlm.see(SAMPLE), get_method("luvc+visionzip"), 64)
    attention = attending.tokens.cls_attention
    assert attention.shape[1] == 20 * 21 + 1
    assert len(attending.plan) == 64
    with pytest.raises(UsageError, match="attention is looked at in block 1, which has more patches then"):
        vlm.compress(vlm.see(SAMPLE), get_method("luvc+visionzip:block=1"), 64)


def test_a_method_that_looks_at_the_question_may_come_second(vlm):
    first = vlm.encode(SAMPLE, question="what colour is the circle")
    assert first.question is None
    asked = vlm.compress(vlm.see(SAMPLE), get_method("luvc+mmtok"), 16, question="what colour is the circle")
    assert asked.question == "what colour is the circle"


def test_rows_that_have_left_the_tower_and_shared_budgets_are_refused():
    with pytest.raises(TokcompError, match=r"method luvc\+mosaic acts in the tower or before it, and these 64 rows"):
        get_method("luvc+mosaic").compress(image(Layout.of_grids((8, 8))), 9)
    with pytest.raises(UsageError, match=r"method luvc\+mosaic acts before; choose another"):
        load(method="luvc+mosaic", keep=64, dynamic="running")


def test_the_overlay_dims_merged_cells_that_are_dropped(tmp_path):
    seen = {}
    for method, keep in (("luvc", "0.5"), ("luvc+uniform", "0.05")):
        target = tmp_path / f"{keep}.png"
        assert main(["inspect", str(SAMPLE), "--method", method, "--keep", keep, "--out", str(target)]) == 0
        seen[method] = np.asarray(Image.open(target), np.float32)
    whole, few = seen.values()
    assert few.shape == whole.shape
    assert few[:600].mean() < 0.6 * whole[:600].mean()


def test_a_picture_is_made_ready_once_and_that_is_no_part_of_decoding_it(vlm, monkeypatch):
    pixels, clock = vlm.engine.pixels, SimpleNamespace(now=0.0)

    def slow(*arguments):
        clock.now += 1.0
        return pixels(*arguments)

    monkeypatch.setattr(vlm.engine, "pixels", slow)
    for module in ("encoder", "tower_engine"):
        monkeypatch.setattr(f"edge_tokcomp.{module}.time", SimpleNamespace(perf_counter=lambda: clock.now))
    timings = vlm.encode(SAMPLE).timings_ms
    assert clock.now == 1.0
    assert [timings[stage] for stage in ("decode", "preprocess", "encode")] == [0.0, 1000.0, 0.0]


def test_one_token_is_not_all_of_them():
    with load(method="luvc", keep=1.0, threads=1) as whole:
        seen = whole.see(SAMPLE)
        assert len(whole.compress(seen, whole.method, 1).plan) == 1
        assert len(whole.compress(seen, whole.method, 1.0).plan) == 576


FAMILIES = ("llava_next", "smolvlm", "internvl_qwen2", "gemma3", "qwen25vl", "qwen3vl", "pixtral", "lfm2vl")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_merges_in_its_tower_and_keeps_what_was_asked_for_of_the_rest(name: str, tmp_path: Path) -> None:
    proof = Proof.make(name, tmp_path)
    picture = photo(61, 133)
    with proof.open(method="luvc:leave=0.6+mosaic", keep=0.3) as vlm:
        encoded = vlm.encode(picture)
        whole = vlm.engine.pixels(picture).grids
        for left, own in zip(encoded.tokens.layout.grids, whole, strict=True):
            assert left[0] * left[1] <= max(0.6 * own[0] * own[1] + 0.5, 1)
        layout = encoded.tokens.layout
        wanted = max(int(0.3 * layout.before + 0.5), layout.protected.sum() + 1)
        assert len(encoded.plan) == min(wanted, len(layout.uncompressed))
        assert vlm.answer(encoded, "what is this", max_tokens=3).tokens_after == len(encoded.plan)
