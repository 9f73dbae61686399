"""What steps inside the language model decide, on made-up hidden states and attention."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tokcomp.errors import UsageError
from edge_tokcomp.layer_state import LayerState
from edge_tokcomp.methods.layer_step import LayerStep
from edge_tokcomp.methods.layer_steps import (
    LAYER_STEPS,
    DuplicatesDrop,
    FastV,
    InformationMigration,
    PyramidDrop,
    Spectrum,
    image_share,
    read_layer_step,
)  # fmt: skip


def state(rows: int = 30, entered: int | None = None, seed: int = 0, crops: int = 1) -> LayerState:
    """Four system rows, the image's, six of text."""
    rng = np.random.default_rng(seed)
    return LayerState(
        hidden=rng.standard_normal((rows, 12)).astype(np.float32),
        crop=np.repeat(np.arange(crops), -(-rows // crops))[:rows],
        entered=rows if entered is None else entered,
        image=4 + np.arange(rows),
        text=4 + rows + np.arange(6),
        attention=rng.dirichlet(np.full(rows + 10, 0.3), 6).astype(np.float32),
        keys=rng.uniform(1, 9, rows + 10).astype(np.float32),
        words=rng.standard_normal((6, 12)).astype(np.float32),
        final_norm=rng.uniform(0.5, 2, 12).astype(np.float32),
    )


def test_fastv_keeps_the_rows_the_last_token_looks_at_most():
    given = state(entered=40)
    kept = FastV().survivors(given, 0.25)
    seen = given.attention[-1, 4:34]
    assert kept.tolist() == sorted(sorted(range(30), key=lambda i: -seen[i])[:10])


def test_pyramid_halves_what_is_left():
    given = state(entered=576)
    seen = given.attention[-1, 4:34]
    assert PyramidDrop().survivors(given, 0.5).tolist() == sorted(sorted(range(30), key=lambda i: -seen[i])[:15])
    left, counts = 576, []
    for _ in range(3):
        left = len(PyramidDrop().survivors(state(left, 576), 0.5))
        counts.append(left)
    assert counts == [288, 144, 72]


def test_dart_keeps_the_rows_with_the_largest_keys_and_those_least_like_them_and_like_such_words():
    given = state(entered=48)
    normed = {i: given.hidden[i] * given.final_norm for i in range(30)}
    pivots = sorted(range(30), key=lambda i: -given.keys[given.image[i]])[:2]
    said = sorted(range(6), key=lambda i: -given.keys[given.text[i]])[:3]
    directions = [normed[i] for i in pivots] + [given.words[i] * given.final_norm for i in said]
    kept = set(pivots)
    for direction in directions:  # 12 rows: 2 pivots and 2 for each of 5
        alike = {
            i: direction @ row / np.linalg.norm(direction) / np.linalg.norm(row)
            for i, row in normed.items()
            if i not in kept
        }
        kept |= set(sorted(alike, key=alike.__getitem__)[:2])
    step = DuplicatesDrop(image_pivots=2, text_pivots=3)
    assert step.survivors(given, 0.25).tolist() == sorted(kept)
    assert len(step.survivors(state(576), 0.222)) == 128
    assert len(step.survivors(given, 1 / 48)) == 1


def test_todre_drops_the_whole_image_once_text_hardly_looks_at_it():
    given = state()
    share = sum(given.attention[i, j] for i in range(6) for j in given.image) / given.attention.sum()
    assert image_share(given) == pytest.approx(share)
    assert InformationMigration().survivors(given, share - 0.01).tolist() == list(range(30))
    assert InformationMigration().survivors(given, share + 0.01).tolist() == []


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("cutoff", [0.01, 0.25, 1.0])
def test_spectrum_energy_is_that_of_the_lowest_frequencies(mirrored, scaled, centred, cutoff):
    hidden = state(20).hidden
    rows = hidden.astype(np.float64)
    if scaled:
        rows = rows / np.sqrt((rows**2).mean(axis=1))[:, None]
    if centred:
        rows = rows - sum(rows) / 20
    ring = np.concatenate([rows, rows[::-1]]) if mirrored else rows
    length = len(ring)
    bins = max(2, int(cutoff * (length // 2 + 1)))
    low = np.zeros_like(rows)
    for place in range(20):
        for frequency in range(length):
            if min(frequency, length - frequency) < bins:
                turn = np.exp(2j * np.pi * frequency * (place - np.arange(length)) / length)
                low[place] += (turn[:, None] * ring).sum(axis=0).real / length
    step = Spectrum(cutoff=cutoff, mirrored=mirrored, scaled=scaled, centred=centred)
    np.testing.assert_allclose(step.energy(hidden), (low**2).mean(axis=1), rtol=1e-5, atol=1e-5)
    given = LayerState(hidden, np.zeros(20, np.int64), 20, np.arange(20), np.arange(20, 22))
    expected = sorted(sorted(range(20), key=lambda i: -round((low[i] ** 2).mean(), 4))[:7])
    assert step.survivors(given, 0.35).tolist() == expected


def test_spectrum_treats_each_crop_alone():
    given = state(30, crops=3)
    step = Spectrum()
    energy = np.concatenate([step.energy(given.hidden[10 * c : 10 * c + 10]) for c in range(3)])
    assert step.survivors(given, 0.5).tolist() == sorted(np.argsort(-energy, kind="stable")[:15])


def test_a_mirrored_filter_does_not_spill_the_first_row_into_the_last():
    hidden = np.full((32, 4), 0.01, np.float32)
    hidden[0] = 1
    ends = {m: Spectrum(mirrored=m, scaled=False, centred=False).energy(hidden)[-1] for m in (True, False)}
    assert ends[True] < ends[False] / 10


def test_scaling_keeps_one_huge_row_from_holding_all_the_energy():
    hidden = state(32).hidden.copy()
    hidden[16] *= 1000

    def kept(rows, scaled):
        given = LayerState(rows, np.zeros(32, np.int64), 32, np.arange(32), np.arange(1))
        return set(Spectrum(scaled=scaled).survivors(given, 0.25))

    calm = kept(state(32).hidden, True)
    assert kept(hidden, True) == calm
    assert kept(hidden, False) != calm


def test_centring_keeps_what_differs_from_the_background_and_plain_energy_keeps_the_background():
    rng = np.random.default_rng(3)
    hidden = rng.normal([9, 0, 0, 0], 0.1, (64, 4)).astype(np.float32)
    thing = np.arange(20, 28)
    hidden[thing] = rng.normal([2, 3, 3, 0], 0.1, (8, 4))
    given = LayerState(hidden, np.zeros(64, np.int64), 64, np.arange(64), np.arange(1))
    assert Spectrum(cutoff=1.0).survivors(given, 8 / 64).tolist() == thing.tolist()
    assert not set(thing) & set(Spectrum(cutoff=1.0, centred=False, scaled=False).survivors(given, 8 / 64))


def test_a_cascade_ends_with_no_image_rows():
    step = read_layer_step("spectrum@8:0.5,16:0.25,24:0")
    left, counts = 576, []
    for amount in step.layers(32).values():
        left = len(step.survivors(state(left, 576), amount)) if left else 0
        counts.append(left)
    assert counts == [288, 144, 0]
    assert step.survivors(LayerState(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 576, np.zeros(0, np.int64),
                                     np.arange(3)), 0.5).tolist() == []  # fmt: skip


@pytest.mark.parametrize("name", LAYER_STEPS)
def test_rows_no_more_than_asked_for_are_all_kept(name):
    if name != "todre":
        assert LAYER_STEPS[name]().survivors(state(9), 1.0).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("text", "depth", "layers"),
    [
        ("spectrum@8:0.5,16:0.25,24:0", 32, {8: 0.5, 16: 0.25, 24: 0.0}),
        ("todre@0.875:0.10", 32, {28: 0.1}),
        ("todre@0.875:0.10", 28, {24: 0.1}),
        ("fastv@2:0.5", 32, {2: 0.5}),
        ("pyramid@8,16,24:0.5", 32, {8: 0.5, 16: 0.5, 24: 0.5}),
        ("pyramid", 32, {8: 0.5, 16: 0.5, 24: 0.5}),
        ("spectrum", 32, {8: 0.5, 16: 0.25, 24: 0.1, 31: 0.0}),
        ("spectrum@1:0.5,cutoff=0.1,scaled=false", 4, {1: 0.5}),
    ],
)
def test_steps_are_read_from_text_and_written_back(text, depth, layers):
    step = read_layer_step(text)
    assert step.layers(depth) == pytest.approx(layers)
    assert read_layer_step(str(step)) == step


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("spektrum@8:0.5", "did you mean 'spectrum'"),
        ("fastv@2", "layer 2 has no amount"),
        ("fastv@two:0.5", "'two' is not a number"),
        ("fastv@2:half", "'half' is not a number"),
        ("fastv@2:1.5", "amount 1.5 must lie between 0 and 1"),
        ("fastv@-1:0.5", "layer -1"),
        ("fastv@1.5:0.5", "layer 1.5"),
        ("fastv@", "is not a number"),
        ("fastv@nan:0.5", "'nan' is not a number; write NAME@LAYER:AMOUNT"),
        ("fastv@2:nan", "'nan' is not a number; write NAME@LAYER:AMOUNT"),
        ("fastv@inf:0.5", "'inf' is not a number; write NAME@LAYER:AMOUNT"),
        ("todre@2:-1e999", "'-1e999' is not a number; write NAME@LAYER:AMOUNT"),
        (f"fastv@2:1{400 * '0'}", "0' is not a number; write NAME@LAYER:AMOUNT"),
        ("spectrum@2:0.5,cutoff=0", "cutoff"),
        ("spectrum@2:0.5,cutof=0.5", "did you mean 'cutoff'"),
        ("fastv@2:0.5,at=3", "at is written as fastv@LAYER:AMOUNT"),
        ("fastv@at_=3", "at is written as fastv@LAYER:AMOUNT"),
    ],
)
def test_steps_that_make_no_sense_are_refused(text, says):
    with pytest.raises(UsageError, match=says):
        read_layer_step(text)


def test_of_fractions_that_fall_on_one_layer_the_last_counts():
    assert Spectrum().layers(4) == {1: 0.5, 2: 0.25, 3: 0.0}
    assert Spectrum().layers(32) == {8: 0.5, 16: 0.25, 24: 0.1, 31: 0.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fastv@8:0.5", "of a model of 8 layers"),
        ("pyramid@4,2:0.5", "must ascend"),
        ("pyramid@2,0.25:0.5", "twice"),
        ("fastv@0:0.5", "layer 0 has none"),
        ("dart@0.1:0.5", "layer 0 has none"),
    ],
)
def test_layers_a_model_does_not_have_are_refused(text, says):
    with pytest.raises(UsageError, match=says):
        read_layer_step(text).layers(8)


def test_a_step_that_breaks_its_contract_is_named():
    class Sly(LayerStep):
        name = "sly"

        def choose(self, state, amount):
            return np.array([3, 2])

    with pytest.raises(ValueError, match="sly must return ascending"):
        Sly(((1, 0.5),)).survivors(state(), 0.5)
    given = state()
    bare = LayerState(given.hidden, given.crop, 30, given.image, given.text)
    with pytest.raises(ValueError, match="needs attention"):
        FastV().survivors(bare, 0.5)
    with pytest.raises(ValueError, match="needs keys, words and final_norm"):
        DuplicatesDrop().survivors(bare, 0.5)
