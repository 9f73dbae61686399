"""A budget shared among pictures by what there is to see in each: scores, shares, where a mean comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.budget import dynamic_keep, dynamic_keeps
from edge_tokcomp.dynamic import (
    Calibration,
    Claim,
    Share,
    Sharing,
    calibration_path,
    share_alone,
    share_batch,
    sharing_of,
)
from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.methods import METHODS, TowerMethod, get_method
from edge_tokcomp.tokens import Layout, Role, VisionTokens
from made_up_images import compress, image, with_separators


def claims_of(*scores: float, keep: int = 64, most: int = 576) -> list[Claim]:
    return [Claim(score, keep, 0, most) for score in scores]


def test_the_score_is_one_minus_the_mean_cosine_of_the_patches_alone() -> None:
    layout = with_separators(Layout.of_grids((4, 5), (3, 3), cls_rows=True), [2, 9, 30])
    tokens = image(layout, 3)
    rows = tokens.features[layout.role == Role.PATCH].astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(i)]
    claim = Claim.of(tokens, 9)
    assert claim.information == round(1 - sum(pairs) / len(pairs), 6)
    assert (claim.keep, claim.fixed, claim.most) == (9, 3, 29 + 3)
    tokens.features[layout.role != Role.PATCH] *= 7
    assert Claim.of(tokens, 9).information == claim.information


def test_a_picture_of_one_colour_scores_nothing_and_one_that_is_broken_is_refused() -> None:
    flat = VisionTokens(np.full((36, 8), 0.7, np.float32), Layout.of_grids((6, 6)))
    assert Claim.of(flat, 0.25) == Claim(0.0, 9, 0, 36)
    flat.features[5, 2] = np.nan
    with pytest.raises(TokcompError, match="features, row 5: not finite"):
        Claim.of(flat, 0.25)


def test_torch_and_numpy_score_alike() -> None:
    torch = pytest.importorskip("torch")
    tokens = image(Layout.of_grids((6, 6)), 1)
    same = VisionTokens(torch.from_numpy(tokens.features), tokens.layout)
    assert Claim.of(same, 9) == Claim.of(tokens, 9)


def test_a_batch_is_shared_as_the_budget_says_and_reports_the_mean() -> None:
    shares = share_batch(claims_of(0.2, 0.4, 0.6))
    assert [share.keep for share in shares] == dynamic_keeps([64] * 3, [0.2, 0.4, 0.6], [576] * 3) == [32, 64, 96]
    assert {(share.mean, share.by) for share in shares} == {(0.4, "batch")}
    assert [share.information for share in shares] == [0.2, 0.4, 0.6]
    assert share_batch([]) == []


def test_the_reported_mean_explains_shares_of_different_budgets() -> None:
    claims = [Claim(0.3, 40, 0, 400), Claim(0.5, 80, 0, 800), Claim(0.4, 20, 0, 200)]
    for claim, share in zip(claims, share_batch(claims), strict=True):
        assert abs(share.keep - claim.keep * claim.information / share.mean) < 1


def test_separators_are_kept_by_all_and_shared_by_none() -> None:
    shares = share_batch([Claim(0.2, 30, 10, 110), Claim(0.6, 30, 10, 110)])
    assert [share.keep for share in shares] == [10 + 10, 10 + 30]
    assert share_alone(Claim(0.9, 30, 10, 110), 0.3, "calibrated").keep == 10 + 40
    assert share_alone(Claim(0.0, 30, 10, 110), 0.3, "calibrated").keep == 10 + 10


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(n for n, c in METHODS.items() if c.compresses and not issubclass(c, TowerMethod))), st.data()
)
def test_under_every_method_the_plans_of_a_batch_keep_exactly_its_budget(name: str, data: st.DataObject) -> None:
    tokens = []
    for seed in range(data.draw(st.integers(1, 4))):
        layout = Layout.of_grids(
            *data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)), cls_rows=True
        )
        places = data.draw(st.lists(st.integers(0, len(layout)), max_size=3))
        tokens.append(image(with_separators(layout, sorted(places)) if places else layout, seed))
    keep = data.draw(st.integers(1, 40) | st.floats(0.05, 1))
    static = [len(compress(name, each, keep)) for each in tokens]
    shares = share_batch([Claim.of(each, keep) for each in tokens])
    plans = [compress(name, each, share.keep) for each, share in zip(tokens, shares, strict=True)]
    assert [len(plan) for plan in plans] == [share.keep for share in shares]
    assert sum(map(len, plans)) == sum(static)


def test_pictures_of_one_request_share_exactly_whatever_the_mode() -> None:
    for mode in ("batch", "running", "calibrated", 0.1):
        sharing = Sharing(mode)  # type: ignore[arg-type]
        shares = sharing.shares(claims_of(0.2, 0.4, 0.6))
        assert [share.keep for share in shares] == [32, 64, 96]
        assert {share.by for share in shares} == {"batch"}


def test_a_single_picture_is_measured_against_the_running_mean_itself_included() -> None:
    sharing = Sharing("running")
    scores, found = [0.4, 0.6, 0.2, 0.4], []
    for count, score in enumerate(scores, start=1):
        (share,) = sharing.shares(claims_of(score))
        mean = round(sum(scores[:count]) / count, 6)
        assert share == Share(dynamic_keep(64, score, mean, 576), score, mean, "running")
        found.append(share)
    sharing.restart()
    assert [sharing.shares(claims_of(score))[0] for score in scores] == found
    sharing.restart()
    sharing.note(0.4)
    sharing.shares(claims_of(0.6))
    sharing.shares(claims_of(0.2))
    assert sharing.shares(claims_of(0.4)) == found[3:]


def test_a_single_picture_is_measured_against_a_mean_that_is_known() -> None:
    for score in (0.1, 0.5, 0.9):
        assert Sharing(0.45).shares(claims_of(score)) == [
            Share(dynamic_keep(64, score, 0.45, 576), score, 0.45, "given")
        ]
    assert Sharing("batch").shares(claims_of(0.7)) == [Share(64, 0.7, 0.7, "batch")]


def test_the_key_tells_modes_and_means_apart() -> None:
    keys = [Sharing(mode).key for mode in ("batch", "running", 0.5, 0.6)]  # type: ignore[arg-type]
    assert keys == ["batch", "running", 0.5, 0.6]


@pytest.mark.parametrize(
    "mode", ["sometimes", "", True, False, 0, -0.1, 2.1, float("nan"), float("inf"), [0.5], b"batch"]
)
def test_nonsense_is_refused(mode: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown dynamic|no mean information score"):
        Sharing(mode)


def test_there_must_be_a_budget_to_share() -> None:
    assert sharing_of(None, get_method("prunesid"), None) is None
    with pytest.raises(UsageError, match="keep is not given"):
        sharing_of("running", get_method("prunesid"), None)
    with pytest.raises(UsageError, match="method none keeps every token"):
        sharing_of("running", get_method("none"), 4)


def test_a_calibration_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    tower = tmp_path / "abc-v1-fp32"
    found = Calibration.of([0.25, 0.5, 0.375, 0.125])
    assert found == Calibration(0.3125, 4, 0.125, 0.5)
    path = found.save(tower)
    assert path == calibration_path(tower) == tmp_path / "abc-v1-fp32.calibration.json"
    assert Calibration.stored(tower, Path("m.gguf")) == found
    assert Calibration.of([0.5]).save(tower) == path
    assert Calibration.stored(tower, Path("m.gguf")).mean == 0.5
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert str(found) == "mean information 0.312 of 4 pictures (0.125 to 0.500)"


def test_pictures_that_say_nothing_give_no_calibration() -> None:
    for scores in ([], [0.0, 0.0]):
        with pytest.raises(UsageError, match="picture"):
            Calibration.of(scores)


GOOD = {"mean": 0.3, "pictures": 4, "lowest": 0.1, "highest": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "", "text", "[]", "3", '{"mean": 0.3}', "[" * 5000, b"\xff\xfe",
        json.dumps(GOOD | {"mean": 0}), json.dumps(GOOD | {"mean": -1}), json.dumps(GOOD | {"mean": float("nan")}),
        json.dumps(GOOD | {"mean": 1e300}), json.dumps(GOOD | {"mean": "x"}), json.dumps(GOOD | {"mean": 10**400}),
        json.dumps(GOOD | {"highest": 3}), json.dumps(GOOD | {"pictures": None}), json.dumps(GOOD) + "x",
    ],
)  # fmt: skip
def test_files_that_are_no_calibration_are_refused_in_one_line(tmp_path: Path, text: str | bytes) -> None:
    path = calibration_path(tmp_path / "tower")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TokcompError, match="not a calibration") as caught:
        Calibration.stored(tmp_path / "tower", Path("m.gguf"))
    assert "\n" not in str(caught.value)


def test_a_model_that_was_never_calibrated_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TokcompError, match=r"nothing is stored .* edge-tokcomp calibrate .*\(m\.gguf\)"):
        Calibration.stored(tmp_path / "tower", Path("m.gguf"))
    with pytest.raises(TokcompError, match="cannot be written"):
        Calibration.of([0.5]).save(tmp_path / "none" / "tower")
