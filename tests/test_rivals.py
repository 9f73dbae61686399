"""The rivals' methods against slow versions written from their descriptions, one pair at a time."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.methods import get_method, kernels, selection
from edge_tokcomp.methods.holov import chunk_quotas
from edge_tokcomp.methods.kernels import stretched, unit_rows
from edge_tokcomp.methods.selection import Cosines, farthest, log_det
from edge_tokcomp.tokens import Layout, VisionTokens
from made_up_images import compress, greedily, image, question


def cosines(rows: np.ndarray, others: np.ndarray | None = None, centred: bool = False) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows - rows.mean(axis=0) if centred else rows
    others = rows if others is None else others.astype(np.float64)
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in others] for a in rows])


def minmax(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


@pytest.fixture(params=range(3))
def tokens(request) -> VisionTokens:
    return image(Layout.of_grids((7, 8)), request.param)


@pytest.mark.parametrize("centred", [False, True])
def test_divprune_takes_the_token_whose_nearest_chosen_one_is_farthest(tokens, centred):
    distance = 1 - cosines(tokens.embeddings, centred=centred)

    def gain(i, chosen):
        return min(distance[i, j] for j in (chosen or range(56)) if j != i)

    plan = compress(f"divprune:centred={centred}", tokens, 20)
    assert plan.rank.tolist() == greedily(56, 20, gain)


def test_divprune_with_cen_prune_weighs_distance_by_distinctiveness(tokens):
    cosine = cosines(tokens.embeddings, centred=True)
    weight = minmax(-cosine.mean(axis=1))

    def gain(i, chosen):
        return weight[i] * min(1 - cosine[i, j] for j in (chosen or range(56)) if j != i)

    assert compress("divprune:centred=true,distinctive=true", tokens, 20).rank.tolist() == greedily(56, 20, gain)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("centred", [False, True])
def test_scope_takes_the_highest_saliency_times_gain_in_coverage(tokens, alpha, centred):
    cosine = cosines(tokens.features, centred=centred)
    saliency = tokens.cls_attention.astype(np.float64).sum(axis=0) ** alpha

    def gain(i, chosen):
        covered = np.max([np.zeros(56), *(cosine[:, c] for c in chosen)], axis=0)
        return saliency[i] * np.maximum(cosine[:, i] - covered, 0).sum()

    plan = compress(f"scope:alpha={alpha},centred={centred}", tokens, 20)
    assert plan.rank.tolist() == greedily(56, 20, gain)


@pytest.mark.parametrize(
    ("options", "sign", "normalise", "centred"),
    [
        ("relevance=positive", 1, "stretch", False),
        ("relevance=negative", -1, "stretch", False),
        ("relevance=positive,normalise=mean", 1, "mean", False),
        ("relevance=negative,centred=true,distinctive=true", -1, "stretch", True),
        ("relevance=off", 0, "stretch", False),
    ],
)
def test_cdpruner_takes_what_adds_most_to_the_determinant(tokens, options, sign, normalise, centred):
    cosine = cosines(tokens.embeddings, centred=centred)
    worth = np.ones(56)
    if sign:
        worth = minmax(sign * cosines(tokens.embeddings, question(tokens)).mean(axis=1)) + 1e-6
        worth = worth / (worth.max() if normalise == "stretch" else worth.mean())
    if centred:
        worth = worth * minmax(-cosine.mean(axis=1))
    kernel = worth[:, None] * cosine * worth[None, :]

    def gain(i, chosen):
        members = [*chosen, i]
        return np.round(np.linalg.slogdet(kernel[np.ix_(members, members)])[1], 9)

    plan = compress(f"cdpruner:{options}", tokens, 14)
    assert plan.rank.tolist() == greedily(56, 14, gain)


def test_mmtok_takes_what_covers_question_and_picture_best(tokens):
    def softmax(values):
        powers = np.exp(values - values.max())
        return powers / powers.sum()

    asked = cosines(question(tokens), tokens.embeddings)
    seen = cosines(tokens.features)
    text, picture = ([softmax(row / t) / len(rows) for row in rows] for rows, t in ((asked, 0.02), (seen, 0.2)))

    def gain(i, chosen, rows):
        covered = np.max([np.zeros(len(rows)), *(rows[:, c] for c in chosen)], axis=0)
        return np.maximum(rows[:, i] - covered, 0).sum()

    both = np.array([*text, *(0.5 * np.array(picture))])
    expected = greedily(56, 20, lambda i, chosen: gain(i, chosen, both))
    assert compress("mmtok", tokens, 20).rank.tolist() == expected
    blind = greedily(56, 20, lambda i, chosen: gain(i, chosen, np.array(picture)))
    assert get_method("mmtok").compress(tokens, 20).rank.tolist() == blind


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_visionzip_leaves_dominant_tokens_and_lets_targets_take_in_the_rest(tokens, aggregate):
    plan = compress(f"visionzip:aggregate={aggregate},contextual=0.25", tokens, 16)
    attention = tokens.cls_attention.astype(np.float64).sum(axis=0)
    dominant = sorted(range(56), key=lambda i: -attention[i])[:12]
    rest = [i for i in range(56) if i not in dominant]
    targets = [rest[i * (44 // 4)] for i in range(4)]
    assert plan.rank.tolist() == dominant + targets
    cosine = cosines(tokens.keys)
    merged = {i: tokens.features[i] for i in dominant}
    groups = {
        t: [i for i in rest if i not in targets and max(targets, key=lambda u: cosine[i, u]) == t] for t in targets
    }
    for target, members in groups.items():
        taken = [tokens.features[i] for i in members]
        own = tokens.features[target]
        merged[target] = own + np.mean(taken, axis=0) if aggregate == "sum" else np.mean([own, *taken], axis=0)
    expected = np.stack([merged[i] for i in sorted(merged)])
    np.testing.assert_allclose(plan.apply(tokens.features), expected, atol=1e-5)
    assert plan.stats["by_keys"] == 1


def test_visionzip_without_keys_goes_by_features(tokens):
    bare = VisionTokens(tokens.features, tokens.layout, tokens.project, tokens.cls_attention)
    same = VisionTokens(tokens.features, tokens.layout, tokens.project, tokens.cls_attention, tokens.features)
    plan = compress("visionzip", bare, 16)
    assert np.array_equal(plan.assign, compress("visionzip", same, 16).assign)
    assert plan.stats["by_keys"] == 0


def test_vispruner_keeps_the_attended_half_and_thins_out_the_rest(tokens):
    attention = tokens.cls_attention.astype(np.float64).mean(axis=0)
    cosine = cosines(tokens.features)
    order = sorted(range(56), key=lambda i: -attention[i])
    important, left = order[:8], order[8:]
    while len(left) > 8:
        even, odd = left[0::2], left[1::2]
        alike = sorted(even, key=lambda i: -max(cosine[i, j] for j in odd))
        gone = alike[: min(8, len(left) - 8)]
        left = [i for i in left if i not in gone]
    assert compress("vispruner", tokens, 16).rank.tolist() == important + left


@pytest.mark.parametrize("k", [1, 2, 3, 55])
def test_vispruner_reaches_every_budget(tokens, k):
    for important in (0.0, 0.5, 1.0):
        assert len(compress(f"vispruner:important={important}", tokens, k)) == k


def test_dart_takes_for_each_pivot_what_is_least_like_it(tokens):
    rows, words = tokens.embeddings, question(tokens)
    pivots = sorted(range(56), key=lambda i: -np.abs(rows[i]).astype(np.float64).sum())[:4]
    asking = sorted(range(5), key=lambda i: -np.abs(words[i]).astype(np.float64).sum())[:4]
    every = np.concatenate([cosines(rows)[:, pivots], cosines(rows, words)[:, asking]], axis=1)
    kept = list(pivots)
    for column in range(8):
        free = [i for i in range(56) if i not in kept]
        kept += sorted(free, key=lambda i: every[i, column])[:2]
    assert compress("dart", tokens, 20).rank.tolist() == kept
    assert get_method("dart").compress(tokens, 20).rank[:4].tolist() == pivots


def test_holov_gives_chunks_their_share_and_takes_the_attended_in_each(tokens):
    attention = tokens.cls_attention.astype(np.float64).mean(axis=0) * 1000
    context = []
    for start in range(0, 56, 14):
        cosine = cosines(tokens.embeddings[start : start + 14])
        np.fill_diagonal(cosine, 0)
        context += [((row - row.mean()) ** 2).sum() / 13 for row in cosine]
    scale = np.abs(attention).mean() / np.abs(context).mean()
    score = attention + 0.09 * scale * np.array(context)
    share = np.array([score[start : start + 14].mean() for start in range(0, 56, 14)])
    quotas = np.floor(share / share.sum() * 16).astype(int)
    for chunk in np.argsort(-share, kind="stable")[: 16 - quotas.sum()]:
        quotas[chunk] += 1
    assert quotas.max() <= 14
    expected = []
    for chunk, quota in enumerate(quotas):
        members = range(14 * chunk, 14 * chunk + 14)
        expected += sorted(members, key=lambda i: -attention[i])[:quota]
    assert compress("holov:chunks=4", tokens, 16).rank.tolist() == expected


@pytest.mark.parametrize(
    ("k", "scores", "sizes", "quotas"),
    [
        (10, [1, 1, 2], [9, 9, 9], [2, 2, 6]),
        (7, [0.5, 0.3, 0.2], [9, 9, 9], [4, 2, 1]),
        (10, [8, 1, 1], [4, 4, 4], [4, 3, 3]),
        (5, [0, 0, 0], [2, 2, 2], [2, 2, 1]),
        (6, [1, -1, 0], [2, 2, 2], [2, 2, 2]),
    ],
)
def test_chunk_quotas_fill_the_budget_within_the_chunks(k, scores, sizes, quotas):
    assert chunk_quotas(k, scores, sizes) == quotas


@pytest.mark.parametrize("keep", [1, 7, 28, 40, 55])
@pytest.mark.parametrize("centred", [False, True])
def test_tome_merges_the_likest_pairs_of_alternate_tokens_into_means(tokens, keep, centred):
    clusters = [[i] for i in range(56)]
    while len(clusters) > keep:
        means = np.array([tokens.keys[c].astype(np.float64).mean(axis=0) for c in clusters])
        cosine = cosines(means, centred=centred)
        even, odd = range(0, len(clusters), 2), range(1, len(clusters), 2)
        pairs = [(max(odd, key=lambda o: cosine[e, o]), e) for e in even]
        pairs = sorted(pairs, key=lambda pair: -cosine[pair[1], pair[0]])[: len(clusters) - keep]
        for into, source in pairs:
            clusters[into] = clusters[into] + clusters[source]
        gone = {source for _, source in pairs}
        clusters = [c for i, c in enumerate(clusters) if i not in gone]
    plan = compress(f"tome:centred={centred}", tokens, keep)
    assert plan.keep.tolist() == sorted(c[0] for c in clusters)
    assert {frozenset(np.flatnonzero(plan.assign == j).tolist()) for j in range(keep)} == {
        frozenset(c) for c in clusters
    }
    expected = [tokens.features[sorted(c)].mean(axis=0) for c in sorted(clusters)]
    np.testing.assert_allclose(plan.apply(tokens.features), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["tome", "visionzip:aggregate=mean"])
def test_merging_conserves_means(name, tokens):
    plan = compress(name, tokens, 12)
    assert np.all(plan.assign >= 0)
    np.testing.assert_allclose(plan.apply(np.ones((56, 1))), 1, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["divprune", "divprune:centred=true,distinctive=true", "scope", "cdpruner", "mmtok", "cdpruner:relevance=off"],
)
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(name, tokens):
    longest = compress(name, tokens, 50).rank
    for k in (1, 2, 9, 31):
        assert np.array_equal(compress(name, tokens, k).rank, longest[:k])


@pytest.mark.parametrize(
    "option",
    ["scope:alpha=-1", "visionzip:contextual=1", "vispruner:important=1.5", "vispruner:step=0", "holov:chunks=0",
     "mmtok:alpha=-0.1", "mmtok:text_temperature=0", "dart:image_pivots=0"],
)  # fmt: skip
def test_options_out_of_range_are_refused(option):
    with pytest.raises(UsageError, match=option.split(":")[0]):
        get_method(option)


def test_a_method_that_needs_the_question_says_so_and_what_to_do_without(tokens):
    with pytest.raises(TokcompError, match=r"cdpruner needs the question.*relevance=off"):
        get_method("cdpruner").compress(tokens, 5)


def test_a_question_of_no_words_is_none(tokens):
    nothing = np.empty((0, 20), np.float32)
    with pytest.raises(TokcompError, match="cdpruner needs the question"):
        get_method("cdpruner").compress(tokens, 5, query=nothing)
    for name in ("mmtok", "dart"):
        asked, plain = get_method(name).compress(tokens, 5, query=nothing), get_method(name).compress(tokens, 5)
        np.testing.assert_array_equal(asked.keep, plain.keep)


def test_different_questions_keep_different_tokens(tokens):
    other = np.random.default_rng(5).standard_normal((4, 20)).astype(np.float32)
    for name in ("cdpruner", "mmtok", "dart"):
        assert not np.array_equal(
            compress(name, tokens, 12).keep, get_method(name).compress(tokens, 12, query=other).keep
        ), name


def test_log_det_puts_rows_that_add_no_volume_last_in_raster_order():
    basis = np.eye(3)
    rows = basis[[0, 0, 1, 1, 2, 2]]
    kernel = rows @ rows.T
    order = log_det(lambda chosen: kernel[chosen][0], np.diag(kernel), 6)
    assert order.tolist() == [0, 2, 4, 1, 3, 5]


def test_nearest_is_the_same_from_the_table_and_in_blocks(monkeypatch):
    unit = unit_rows(np.random.default_rng(1).standard_normal((70, 9)))
    table = Cosines(unit, 70)
    monkeypatch.setattr(selection, "_GRAM_ROWS", 0)
    monkeypatch.setattr(kernels, "_BLOCK_VALUES", 16 * 70)
    blocks = Cosines(unit, 70)
    assert table.table is not None
    assert blocks.table is None
    expected = (unit @ unit.T - 2 * np.eye(70)).max(axis=1)
    np.testing.assert_allclose(table.nearest(), expected, atol=1e-12)
    np.testing.assert_allclose(blocks.nearest(), expected, atol=1e-12)
    assert farthest(table, 20, 3, "max_min").tolist() == farthest(blocks, 20, 3, "max_min").tolist()


def test_the_one_row_there_is_has_no_nearest_other():
    assert Cosines(np.ones((1, 1)), 1).nearest().tolist() == [-1]


@pytest.mark.parametrize("name", ["divprune", "scope", "mmtok", "todre", "cdpruner:relevance=off", "vispruner"])
def test_plans_do_not_depend_on_what_is_computed_at_once(name, tokens, monkeypatch):
    whole = compress(name, tokens, 20).rank.tolist()
    for room, setting, value in (
        (kernels, "_BLOCK_VALUES", 1),
        (kernels, "_BLOCK_VALUES", 56 * 10),
        (selection, "_ROWS_PER_STEP", 0),
    ):
        monkeypatch.setattr(room, setting, value)
        assert compress(name, tokens, 20).rank.tolist() == whole


def test_unit_rows_leave_what_they_were_given_alone():
    torch = pytest.importorskip("torch")
    for rows in (np.random.default_rng(0).standard_normal((7, 4)) + 3, np.eye(4, dtype=np.float32)):
        before = rows.copy()
        for centred in (False, True):
            unit_rows(rows, centred=centred)
            unit_rows(torch.from_numpy(rows), centred=centred)
        assert np.array_equal(rows, before)


@pytest.mark.parametrize(
    "name",
    ["prunesid", "prunesid-paper", "prunesid-qwen", "todre", "divprune", "scope", "cdpruner", "mmtok", "dart", "holov",
     "vispruner", "visionzip", "tome"],
)  # fmt: skip
def test_memory_is_a_few_times_the_square_of_the_tokens(name):
    wide = image(Layout.of_grids((18, 18)), width=324)  # so that the rows themselves take one such square
    compress(name, wide, 162)
    tracemalloc.start()
    compress(name, wide, 162)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (8 * 324**2)


def test_centring_takes_away_what_all_rows_share_and_nothing_else():
    rows = np.random.default_rng(2).standard_normal((12, 5))
    np.testing.assert_allclose(unit_rows(rows + 1000, centred=True), unit_rows(rows - rows.mean(axis=0)), atol=1e-9)
    assert np.all(unit_rows(np.full((4, 3), 0.1), centred=True) == 0)
    assert stretched(np.array([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]
    assert stretched(np.full(3, 0.1)).tolist() == [1, 1, 1]
