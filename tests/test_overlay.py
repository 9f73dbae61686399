"""The picture of a plan: each patch in its place, and the counts below, whatever the method is called."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edge_tokcomp.families.base import Pixels
from edge_tokcomp.families.tower_spec import TowerSpec
from edge_tokcomp.overlay import draw_overlay
from edge_tokcomp.tokens import Layout, Plan
from tiny_mmproj import MLP

SPEC = TowerSpec(
    family="llava15", image_size=48, patch_size=8, width=64, heads=4, ffn_width=128, blocks=3, activation="gelu",
    eps=1e-6, image_mean=(0, 0, 0), image_std=(1, 1, 1), projector=MLP,
    class_token=False, attention_block=None,
)  # fmt: skip
PLAN = Plan(np.arange(9), np.arange(9), 36, 36)
LONG = "prunesid:" + ",".join(f"option_{number}=0.125" for number in range(12))


def strip(method: str) -> NDArray[np.bool_]:
    """Where there is writing below the picture."""
    pixels = Pixels((np.zeros((3, 48, 48), np.float32),), ((6, 6),), (48, 48))
    drawn = np.asarray(draw_overlay(pixels, SPEC, Layout.of_grids((6, 6)), PLAN, method))[-34:]
    return np.asarray((drawn != (24, 24, 24)).any(axis=-1))


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written."""
    written: list[str] = []
    text = ImageDraw.ImageDraw.text

    def listening(pen: ImageDraw.ImageDraw, place: tuple[int, int], label: str, *rest: object, **more: object) -> None:
        written.append(label)
        text(pen, place, label, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", listening)
    return written


def test_borders_run_between_what_was_merged_in_a_plan_or_in_the_tower() -> None:
    pixels, layout = Pixels((np.zeros((3, 48, 48), np.float32),), ((6, 6),), (48, 48)), Layout.of_grids((6, 6))
    halves = np.repeat([0, 1], 18)  # the upper three rows, the lower three
    plan = Plan(np.array([7, 25]), np.array([7, 25]), 36, 36, halves, np.full(36, 1 / 18, np.float32))
    patch = 112
    merged = np.asarray(draw_overlay(pixels, SPEC, layout, plan, "pool"))
    assert (merged[3 * patch, 5:-5] == (150, 125, 60)).all()
    assert not (merged[[patch // 2, 5 * patch + 9]] == (150, 125, 60)).all(axis=-1).any()
    rows = Layout.of_grids((1, 2))
    whole = Plan(np.arange(2), np.arange(2), 2, 36)
    inside = np.asarray(draw_overlay(pixels, SPEC, rows, whole, "luvc", halves[None]))
    assert (inside[3 * patch, 5:-5] == (255, 196, 0)).all()
    assert not (inside[[patch // 2, 5 * patch + 9]] == (255, 196, 0)).all(axis=-1).any()


def test_counts_come_first_and_a_long_method_is_cut(labels: list[str]) -> None:
    counts = "36 to 9 (25.0 %)  "
    room = round(ImageFont.load_default(size=18).getlength(counts))
    short, long = strip("pool"), strip(LONG)
    assert labels[0] == counts + "pool"
    assert labels[1].startswith(counts + "prunesid:option_0=0.125,")
    assert labels[1].endswith("...")
    assert np.array_equal(short[:, :room], long[:, :room])
    assert short[:, :room].any()
    assert not long[:, -8:].any()
    assert long[:, -60:].any()


def test_a_method_that_fits_to_the_pixel_is_not_cut(labels: list[str]) -> None:
    font, method = ImageFont.load_default(size=18), ""
    while font.getlength("36 to 9 (25.0 %)  " + method + "x") <= 672 - 20:
        method += "x"
    strip(method)
    strip(method + "x")
    assert labels[0].endswith("x")
    assert labels[1].endswith("x...")


def test_kept_patches_are_shown_as_they_are_in_their_places_and_others_dimmed() -> None:
    spec = replace(SPEC, image_size=64)
    light = np.random.default_rng(0).uniform(0.6, 1.0, (1, 3, 32, 64)).astype(np.float32)
    plan = Plan(np.array([1, 6, 15]), np.array([6, 15, 1]), 32, 32)
    drawn = draw_overlay(Pixels((light[0],), ((4, 8),), light.shape[2:]), spec, Layout.of_grids((4, 8)), plan, "pool")
    patch = drawn.width // 8
    whole = Image.fromarray((light[0].transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8))
    plain = np.asarray(whole.resize((8 * patch, 4 * patch), Image.Resampling.BICUBIC), np.float32)
    shown = np.asarray(drawn, np.float32)[: 4 * patch]
    for cell in range(32):
        top, left = cell // 8 * patch + 2, cell % 8 * patch + 2
        inside = np.s_[top : top + patch - 4, left : left + patch - 4]
        if cell in plan.keep:
            np.testing.assert_allclose(shown[inside], plain[inside], atol=1.5)
        else:
            assert shown[inside].mean() < 0.6 * plain[inside].mean()
