"""Descriptions of towers from folders of others: every field is checked, and faults are one line."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.families.tower_spec import Deepstack, Limits, Rotary, Step, TowerSpec, Window

LINEAR = Step("linear", "mm.0")
SPEC = TowerSpec(
    family="qwen2.5vl", image_size=560, patch_size=14, width=64, heads=4, ffn_width=128, blocks=8, activation="silu",
    eps=1e-6, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), class_token=False, attention_block=None,
    projector=(Step("layer_norm", "mm.norm"), LINEAR, Step("gelu"), Step("linear", "mm.2")), dynamic=True,
    rotary=Rotary(), window=Window(4, (3, 7)), merge=2, deepstack=(Deepstack(2, (LINEAR,)), Deepstack(5, (LINEAR,))),
    limits=Limits(min_pixels=784, max_pixels=16384 * 784, min_tiles=1, max_tiles=64, longest_edge=3584),
)  # fmt: skip
STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 2**63, 10**400, 0.5, math.nan, math.inf, "x", "", "\ud800", "a\nb", [], [[]], [1, 2],
    [None] * 3, {}, {"x": 1}, ["x"] * 3, [10**400] * 3,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def changed(at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    values = copy.deepcopy(json.loads(json.dumps(SPEC.to_dict())))
    inner = values
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return values


def test_a_description_comes_back_from_json() -> None:
    assert TowerSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_any_value_anywhere_is_taken_or_refused_in_one_line() -> None:
    faults: list[str] = []
    for at in places(json.loads(json.dumps(SPEC.to_dict()))):
        for value in STRANGE:
            try:
                spec = TowerSpec.from_dict(changed(at, value))
            except TokcompError as fault:
                faults.append(str(fault))
            else:
                assert TowerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec, (at, value)
    assert len(faults) > 1000
    assert not [fault for fault in faults if "\n" in fault or len(fault) > 400]


@pytest.mark.parametrize("values", [[], None, "x", {}, {"a\nb": 1}, SPEC.to_dict() | {"a\nb": 1}])
def test_what_is_no_description_is_refused_in_one_line(values: Any) -> None:
    with pytest.raises(TokcompError, match="not a tower description") as fault:
        TowerSpec.from_dict(values)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("window", "side"), 0, r"window\.side 0 is not an integer within 1\.\.256"),
        (("window", "side"), 257, r"window\.side 257"),
        (("window", "side"), True, r"window\.side True"),
        (("window", "side"), 4.0, r"window\.side 4\.0"),
        (("window", "whole"), [3, 2.5], r"whole block 2\.5"),
        (("window", "whole"), [8], r"whole block 8 is not an integer within 0\.\.7"),
        (("window", "whole"), [3, 3], "whole block 3 comes after 3"),
        (("limits", "max_pixels"), 16384 * 784 + 1, r"784 to 12845057 pixels of .* not within 784\.\.12845056"),
        (("limits", "min_pixels"), 783, "783 to 12845056 pixels"),
        (("limits", "min_pixels"), 1e3, r"limits\.min_pixels 1000\.0 is not an integer"),
        (("limits", "min_pixels"), None, "None to 12845056 pixels"),
        (("limits", "max_tiles"), 65, r"1 to 65 tiles of a picture are not within 1\.\.64"),
        (("limits", "longest_edge"), 0, r"limits\.longest_edge 0"),
        (("limits", "longest_edge"), 3585, "makes up to 16641 tokens of 28 pixels a side, 16384 are possible"),
        (("limits", "pinpoints"), [[560, 561]], r"pinpoint \(560, 561\) is not height and width of whole tiles of 560"),
        (("limits", "pinpoints"), [[560 * 65, 560]], "more than 64 tiles of 560 pixels"),
        (("limits", "pinpoints"), [[560, 0.5]], r"pinpoints 0\.5"),
        (("projector", 0, "kind"), "conv", "projector step 'conv' is none of linear"),
        (("projector", 0, "name"), 3, "name of a layer_norm 3"),
        (("projector", 0, "name"), "", "name of a layer_norm ''"),
        (("projector", 0, "name"), "a\nb", r"name of a layer_norm 'a\\nb' is not a name"),
        (("projector", 1, "bias"), 1, r"linear mm\.0: bias 1 is not true or false"),
        (("projector", 0, "eps"), 1.0, r"layer_norm mm\.norm: eps 1\.0"),
        (("projector", 0, "eps"), math.nan, r"layer_norm mm\.norm: eps nan"),
        (("deepstack", 0, "projector"), [], r"deepstack\.projector: without a linear step"),
        (("deepstack", 0, "block"), 5, "deepstack block 5 comes after 5"),
        (("deepstack", 0, "block"), "2", "deepstack block '2'"),
        (("rotary", "theta"), math.inf, "base inf of rotary positions"),
        (("rotary", "theta"), True, "base True of rotary positions"),
        (("rotary", "adjacent"), "no", r"rotary\.adjacent 'no' is not true or false"),
        (("post_norm",), "yes", "post_norm 'yes' is not true or false"),
        (("class_token",), 0, "class_token 0 is not true or false"),
        (("family",), ["a"], r"family \['a'\] is not a name"),
        (("separator",), None, "separator None is not a name"),
        (("last_norm",), "", "last_norm '' is not a name"),
        (("eps",), math.nan, "layer norm epsilon nan"),
        (("image_mean",), [0.5, 0.5, 10.5], r"image_mean 10\.5 is not a number within -10\.\.10"),
        (("image_mean",), [0.5, 0.5], "image_mean .* is not three numbers"),
        (("image_mean",), [10**400] * 3, "image_mean 1000"),
        (("image_std",), [0.5, 0.5, 1e-4], r"image_std 0\.0001 is not a number within 0\.001\.\.1000"),
        (("image_std",), [0.5, True, 1.0], "image_std True"),
    ],
)  # fmt: skip
def test_a_value_that_is_impossible_is_named(at: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(TokcompError, match=message) as fault:
        TowerSpec.from_dict(changed(at, value))
    assert "\n" not in str(fault.value)


def test_a_square_tower_cuts_pictures_into_a_bounded_number_of_tiles() -> None:
    values = SPEC.to_dict() | {"dynamic": False, "limits": {"longest_edge": 8 * 560}}
    assert TowerSpec.from_dict(values).limits.longest_edge == 4480
    values["limits"] = {"longest_edge": 8 * 560 + 1}
    with pytest.raises(TokcompError, match="makes up to 81 tiles of 560 pixels a side, 64 are possible"):
        TowerSpec.from_dict(values)
