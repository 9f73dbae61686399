from __future__ import annotations

import io
import os
import stat
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.tokens import Layout, Plan, Role, Rows, VisionTokens


def merging_plan() -> Plan:
    return Plan(
        keep=np.array([1, 4]),
        rank=np.array([4, 1]),
        total=6,
        before=6,
        assign=np.array([0, 0, -1, 1, 1, 1]),
        weight=np.array([0.25, 0.75, 0.0, 0.5, 0.25, 0.25], np.float32),
        stats={"tau": 0.5},
    )


def test_crops_follow_each_other_led_by_their_cls_rows():
    layout = Layout.of_grids((2, 3), (1, 2), cls_rows=True)
    assert layout.crop.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert layout.cell.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1, 0, 1]
    assert layout.patches.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert layout.uncompressed.tolist() == layout.patches.tolist()
    assert not layout.protected.any()


def test_frames_are_crops_in_time_and_none_is_an_overview():
    layout = Layout.of_frames(3, (1, 2), cls_rows=True)
    assert layout.grids == ((1, 2),) * 3
    assert layout.crop.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert layout.cell.tolist() == [-1, 0, 1] * 3
    assert layout.overview is None
    assert Layout.of_grids((1, 2), (1, 2), overview=1).overview == 1
    for wrong in (2, -1, True):
        with pytest.raises(ValueError, match=f"overview {wrong} is none of 2 crops"):
            Layout.of_grids((1, 2), (1, 2), overview=wrong)
    with pytest.raises(ValueError, match="0 frames"):
        Layout.of_frames(0, (2, 2))


def test_separators_are_protected_and_part_of_the_uncompressed_image():
    role = np.array([Role.PATCH, Role.SEPARATOR, Role.PATCH, Role.CLS], np.int8)
    layout = Layout(((1, 2),), np.zeros(4, np.int64), np.array([0, -1, 1, -1]), role)
    assert layout.protected.tolist() == [False, True, False, False]
    assert layout.uncompressed.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("crop", "cell", "role", "says"),
    [
        ([0, 0], [0], [0, 0], "share one axis"),
        ([0, 1], [0, 0], [0, 0], "crop 1"),
        ([0, -1], [0, 0], [0, 0], "crop"),
        ([0, 0], [0, 4], [0, 0], "outside"),
        ([0, 0], [0, -1], [0, 0], "outside"),
    ],
)
def test_impossible_layouts_are_refused(crop, cell, role, says):
    with pytest.raises(ValueError, match=says):
        Layout(((2, 2),), np.array(crop), np.array(cell), np.array(role, np.int8))


def test_grids_without_cells_are_refused():
    with pytest.raises(ValueError, match="no cells"):
        Layout.of_grids((0, 3))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"features": np.zeros((3, 2), np.float32)}, "do not fit a layout of 4 rows"),
        ({"features": np.zeros(4, np.float32)}, "do not fit"),
        ({"features": np.zeros((4, 2)), "cls_attention": np.zeros(4)}, "must be"),
        ({"features": np.zeros((4, 2)), "cls_attention": np.zeros((4, 2))}, "must be"),
        ({"features": np.zeros((4, 2)), "keys": np.zeros((3, 2))}, "keys"),
    ],
)
def test_arrays_that_do_not_fit_the_layout_are_refused(arrays, says):
    with pytest.raises(ValueError, match=says):
        VisionTokens(layout=Layout.of_grids((2, 2)), **arrays)


def test_only_kept_rows_are_projected_unless_all_were_asked_for_and_then_once():
    seen = []

    def project(rows):
        seen.append(len(rows))
        return rows * 2

    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    plan = Plan(np.array([1, 4]), np.array([1, 4]), 6, 6)
    tokens = VisionTokens(features, Layout.of_grids((2, 3)), project=project)
    assert np.array_equal(tokens.rows(plan), features[[1, 4]] * 2)
    assert seen == [2]
    assert np.array_equal(tokens.embeddings, features * 2)
    assert np.array_equal(tokens.rows(plan), features[[1, 4]] * 2)
    assert seen == [2, 6]
    merged = tokens.rows(merging_plan())
    assert np.allclose(merged[0], 2 * (0.25 * features[0] + 0.75 * features[1]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"keep": [4, 1]}, "ascending"),
        ({"keep": [1, 1]}, "ascending"),
        ({"keep": [-1, 4], "rank": [-1, 4]}, "ascending"),
        ({"keep": [1, 6], "rank": [1, 6]}, "ascending"),
        ({"rank": [1, 2]}, "permutation"),
        ({"before": 0}, "before"),
        ({"weight": None}, "come together"),
        ({"assign": [0, 0, -1, 1, 1]}, "must be"),
        ({"assign": [0, 0, -1, 1, 1, 2]}, "within"),
        ({"assign": [0, 0, -2, 1, 1, 1]}, "within"),
        ({"assign": [0, 0, -1, -1, -1, -1]}, "at least one row"),
        ({"weight": [np.nan, 1, 1, 1, 1, 1]}, "finite"),
        ({"order": [4, 1]}, "does not go with assign"),
        ({"order": [4, 2], "assign": None, "weight": None}, "order must be a permutation"),
        ({"order": [4], "assign": None, "weight": None}, "order must be a permutation"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(change, says):
    parts = {
        **merging_plan().__dict__,
        **{k: v if v is None or k == "before" else np.array(v) for k, v in change.items()},
    }
    with pytest.raises(ValueError, match=says):
        Plan(**parts)


@settings(deadline=None)
@given(st.integers(1, 12), st.data(), st.sampled_from([(), (3,), (2, 2)]), st.booleans())
def test_applying_a_plan_equals_gathering_and_summing_by_hand_on_numpy_and_torch(total, data, shape, merging):
    torch = pytest.importorskip("torch")
    keep = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1))))
    assign = weight = None
    rng = np.random.default_rng(total)
    if merging:
        assign = np.array(data.draw(st.lists(st.integers(-1, len(keep) - 1), min_size=total, max_size=total)))
        assign[keep] = np.arange(len(keep))
        weight = rng.uniform(0, 1, total).astype(np.float32)
    plan = Plan(keep, keep, total, total, assign, weight)
    rows = rng.standard_normal((total, *shape)).astype(np.float32)
    expected = np.zeros((len(keep), *shape), np.float32)
    for place, row in enumerate(keep):
        if merging:
            for i in range(total):
                if assign[i] == place:
                    expected[place] += weight[i] * rows[i]
        else:
            expected[place] = rows[row]
    assert np.allclose(plan.apply(rows), expected, atol=1e-6)
    on_torch = plan.apply(torch.from_numpy(rows))
    assert on_torch.dtype == torch.float32
    assert np.allclose(on_torch.numpy(), expected, atol=1e-6)


def test_a_plan_is_refused_rows_of_another_image():
    with pytest.raises(ValueError, match="plan is for 6 rows, got 5"):
        merging_plan().apply(np.zeros((5, 2)))


def test_a_plan_says_what_it_does():
    assert str(merging_plan()) == "6 → 2 (33.3 %)"


def test_rows_are_gathered_in_the_plans_own_order_where_it_has_one():
    torch = pytest.importorskip("torch")
    plan = Plan(np.array([0, 2, 3]), np.array([3, 2, 0]), 4, 4, order=np.array([2, 3, 0]))
    rows = np.arange(8).reshape(4, 2)
    assert plan.apply(rows).tolist() == [[4, 5], [6, 7], [0, 1]]
    assert plan.apply(torch.from_numpy(rows)).tolist() == [[4, 5], [6, 7], [0, 1]]


@pytest.mark.parametrize(
    "plan",
    [
        merging_plan(),
        Plan(np.array([0, 2]), np.array([2, 0]), 3, 3),
        Plan(np.array([0, 2, 3]), np.array([3, 2, 0]), 4, 4, order=np.array([2, 0, 3])),
    ],
)
def test_saved_plans_come_back_the_same(tmp_path, plan):
    plan.save(tmp_path / "a.plan")
    back = Plan.load(tmp_path / "a.plan")
    assert (back.total, back.before, back.stats) == (plan.total, plan.before, plan.stats)
    for name in ("keep", "rank", "assign", "weight", "order"):
        one, two = getattr(plan, name), getattr(back, name)
        assert (one is None and two is None) or (np.array_equal(one, two) and one.dtype == two.dtype)


def test_a_saved_plan_has_the_mode_of_any_new_file(tmp_path):
    for mask in (0o022, 0o007):
        before = os.umask(mask)
        try:
            merging_plan().save(tmp_path / "a.plan")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.plan").stat().st_mode) == 0o666 & ~mask


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    merging_plan().save(tmp_path / "a.plan")
    before = (tmp_path / "a.plan").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        merging_plan().save(tmp_path / "a.plan")
    assert (tmp_path / "a.plan").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]


def npz(compression=zipfile.ZIP_STORED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


GOOD = {
    "keep": npy(np.array([0])), "rank": npy(np.array([0])), "total": npy(np.int64(2)), "before": npy(np.int64(2)),
    "stats_names": npy(np.array(["a"])), "stats_values": npy(np.array([1.0])),
}  # fmt: skip
HUGE = "{'descr': '<i8', 'fortran_order': False, 'shape': (100000000000,), }"
HOSTILE = {
    "empty": b"",
    "text": b"not a plan",
    "a bare array": npy(np.arange(3)),
    "truncated": npz(**GOOD)[:-40],
    "no members": npz(),
    "missing rank": npz(**{k: v for k, v in GOOD.items() if k != "rank"}),
    "pickled object": npz(**GOOD | {"keep": npy(np.array([{"a": 1}], object))}),
    "names that are no characters": npz(**GOOD | {"stats_names": npy(np.array([2**31 - 1], "<i4").view("<U1"))}),
    "huge declared shape": npz(**GOOD | {"keep": header(HUGE)}),
    "zip bomb": npz(zipfile.ZIP_DEFLATED, **GOOD | {"bomb": bytes(80 << 20)}),
    "header that is no dictionary": npz(**GOOD | {"keep": header("((((")}),
    "header with an open string": npz(**GOOD | {"keep": header("{'descr': '''")}),
    "negative index": npz(**GOOD | {"keep": npy(np.array([-1])), "rank": npy(np.array([-1]))}),
    "index past the end": npz(**GOOD | {"keep": npy(np.array([5])), "rank": npy(np.array([5]))}),
    "other rank": npz(**GOOD | {"rank": npy(np.array([1]))}),
    "fractional keep": npz(**GOOD | {"keep": npy(np.array([0.5]))}),
    "two axes": npz(**GOOD | {"keep": npy(np.array([[0]]))}),
    "total is a list": npz(**GOOD | {"total": npy(np.array([2, 2]))}),
    "nothing before": npz(**GOOD | {"before": npy(np.int64(0))}),
    "other order": npz(**GOOD | {"order": npy(np.array([1]))}),
    "fractional order": npz(**GOOD | {"order": npy(np.array([0.0]))}),
    "names without values": npz(**GOOD | {"stats_values": npy(np.array([]))}),
    "weight without assign": npz(**GOOD | {"weight": npy(np.ones(2, np.float32))}),
    "weight beyond float32": npz(**GOOD | {"assign": npy(np.zeros(2, int)), "weight": npy(np.full(2, 1e300))}),
    "infinite weight": npz(**GOOD | {"assign": npy(np.zeros(2, int)), "weight": npy(np.full(2, np.inf))}),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_files_that_are_no_plans_are_refused_by_name(tmp_path, name):
    path = tmp_path / "hostile.plan"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(TokcompError, match=r"hostile\.plan: not a plan file") as fault:
        Plan.load(path)
    assert "\n" not in str(fault.value)


def test_the_file_the_hostile_ones_are_made_from_is_good(tmp_path):
    (tmp_path / "good.plan").write_bytes(npz(**GOOD))
    assert Plan.load(tmp_path / "good.plan").keep.tolist() == [0]
    with pytest.raises(TokcompError, match="not a plan file"):
        Plan.load(tmp_path / "absent.plan")


def test_rows_refuse_other_shapes_and_types():
    rows = np.zeros((3, 4), np.float32)
    assert len(Rows(rows, np.zeros((4, 3), np.int32))) == 3
    with pytest.raises(ValueError, match="float32"):
        Rows(rows.astype(np.float64), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="positions"):
        Rows(rows, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="want_logits"):
        Rows(rows, np.zeros(3, np.int32), want_logits=np.zeros(2, bool))
