from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from sklearn.datasets import load_digits

from edge_tokcomp.export.demo import scenes
from edge_tokcomp.export.demo.questions import (
    TASKS,
    WORDING,
    Question,
    ask_all,
    caption,
    object_f1,
    things_named,
)
from edge_tokcomp.export.demo.scenes import COLORS, PLACES, SHAPES, SIDE, Scene, Split, Thing, draw_scene


def scene_of(*things: Thing) -> Scene:
    return Scene(np.zeros((SIDE, SIDE, 3), np.uint8), things, np.full((SIDE, SIDE), -1, np.int8))


def test_the_same_seed_draws_the_same_scene_and_another_seed_another() -> None:
    first, again, other = draw_scene((5, 1)), draw_scene((5, 1)), draw_scene((5, 2))
    assert np.array_equal(first.image, again.image)
    assert first.things == again.things
    assert not np.array_equal(first.image, other.image)


class Seen:
    """Handwriting samples that note which of them are looked at."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.indices: list[int] = []

    def __getitem__(self, index: int) -> np.ndarray:
        self.indices.append(int(index))
        return self.images[index]


@pytest.mark.parametrize(("split", "start", "stop"), [("test", 0, 539), ("validation", 539, 718), ("train", 718, 1797)])
def test_every_split_draws_handwriting_of_its_own(
    split: Split, start: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 % of scikit-learn's samples test, a seventh of the others validates, the rest trains."""
    images, labels = load_digits(return_X_y=True)
    seen = Seen(images.reshape(-1, 8, 8).astype(np.float32) / 16)
    monkeypatch.setattr(scenes, "_digits", lambda: (seen, labels))
    digits = [
        thing.digit for seed in range(40) for thing in draw_scene((5, seed), split).things if thing.digit is not None
    ]
    mine = np.random.default_rng(20260101).permutation(1797)[start:stop]
    assert [labels[index] for index in seen.indices] == digits
    assert len(set(seen.indices)) > 15
    assert set(seen.indices) <= set(mine.tolist())
    for digit in range(10):
        assert set(scenes._digit_samples(split)[digit]) == {index for index in mine if labels[index] == digit}


def test_every_thing_is_visible_where_it_is_said_to_be() -> None:
    for seed in range(60):
        scene = draw_scene((6, seed))
        assert 1 <= len(scene.things) <= 6
        for number, thing in enumerate(scene.things):
            ys, xs = np.nonzero(scene.owner == number)
            assert len(xs) > 20
            assert abs(xs.mean() - thing.x) < 0.12 * thing.size + 2
            assert abs(ys.mean() - thing.y) < 0.12 * thing.size + 2
            assert int(thing.y // 64) * 3 + int(thing.x // 64) == thing.cell
            if thing.shape != "card":
                seen = np.median(scene.image[ys, xs], axis=0)
                nearest = min(COLORS, key=lambda name: float(np.abs(np.array(COLORS[name]) - seen).sum()))
                assert nearest == thing.color


def test_scenes_have_small_things_and_uneven_backgrounds() -> None:
    scenes = [draw_scene((7, seed)) for seed in range(80)]
    sizes = [thing.size for scene in scenes for thing in scene.things]
    assert sum(size <= 24 for size in sizes) > 0.15 * len(sizes)
    assert min(scene.image[scene.owner < 0].std() for scene in scenes) > 2


def test_existence_is_balanced_and_true() -> None:
    rng = np.random.default_rng(0)
    answers = []
    for seed in range(400):
        scene = draw_scene((8, seed))
        present = {thing.name for thing in scene.things}
        for question in ask_all(scene, rng, vary=False):
            if question.task == "existence":
                name = question.text.removeprefix("Is there an ").removeprefix("Is there a ").removesuffix("?")
                assert (name in present) == (question.answer == "yes")
                answers.append(question.answer == "yes")
    assert 0.43 < np.mean(answers) < 0.57


def named_apart(question: Question, scene: Scene) -> tuple[Thing, Thing]:
    """The two things of a relation."""
    words = question.text.rstrip("?.").split()
    names = [f"{word} {noun}" for word, noun in pairwise(words) if word in COLORS]
    thing, other = (next(t for t in scene.things if t.name == name) for name in names)
    return thing, other


def brute_force(question: Question, scene: Scene) -> str:
    """The answer worked out from the words of the question."""
    words = question.text.rstrip("?.").split()
    colors = [word for word in words if word in COLORS]
    shapes = [word for word in words if word in SHAPES]
    named = [t for t in scene.things if (not colors or t.color == colors[0]) and (not shapes or t.shape == shapes[0])]
    if question.kind == "count":
        noun = words[words.index("are") - 1]
        shape = {"crosses": "cross"}.get(noun, noun.removesuffix("s"))
        return str(
            sum((shape == "object" or t.shape == shape) and (not colors or t.color == colors[0]) for t in scene.things)
        )
    assert len(named) == 1
    if question.kind == "color":
        return named[0].color
    if question.kind == "shape":
        return named[0].shape
    if question.kind == "size":
        return "small" if named[0].size <= 24 else "large"
    if question.kind == "digit":
        return str(named[0].digit)
    if question.kind == "place":
        column, row = int(named[0].x // 64), int(named[0].y // 64)
        return PLACES[row * 3 + column]
    thing, other = named_apart(question, scene)
    right, down = thing.x - other.x, thing.y - other.y
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


def test_answers_equal_those_worked_out_from_the_words() -> None:
    rng = np.random.default_rng(1)
    kinds = set()
    for seed in range(150):
        scene = draw_scene((9, seed))
        for question in ask_all(scene, rng, vary=False, each=dict.fromkeys(WORDING, 2)):
            if question.kind in ("caption", "existence"):
                continue
            kinds.add(question.kind)
            assert question.answer == brute_force(question, scene), question
    assert kinds == set(WORDING) - {"caption", "existence"}
    assert set(TASKS) == {"existence", "attribute", "digit", "relation", "counting", "caption"}


@pytest.mark.parametrize(
    ("right", "down", "answer"),
    [
        (60, 0, "right"), (60, 39, "right"), (-60, -39, "left"), (39, 60, "below"), (-39, -60, "above"),
        (60, 41, None), (-41, 60, None), (50, 50, None), (25, 0, "right"), (23, 0, None),
    ],
)  # fmt: skip
def test_a_relation_is_asked_where_one_direction_prevails_and_nowhere_else(
    right: float, down: float, answer: str | None
) -> None:
    star = Thing("star", "blue", 90 + right, 90 + down, 20, 0)
    scene = scene_of(star, Thing("circle", "red", 90, 90, 20, 4))
    asked = ask_all(scene, np.random.default_rng(0), vary=False, each={"relation": 24})
    answers = {q.answer for q in asked if q.kind == "relation" and named_apart(q, scene)[0] is star}
    assert answers == ({answer} if answer else set())


def test_in_drawn_scenes_one_direction_clearly_prevails_for_every_relation_asked() -> None:
    rng = np.random.default_rng(2)
    asked = 0
    for seed in range(40):
        scene = draw_scene((14, seed))
        for question in ask_all(scene, rng, vary=False, each={"relation": 6}):
            if question.kind == "relation":
                thing, other = named_apart(question, scene)
                lesser, greater = sorted((abs(thing.x - other.x), abs(thing.y - other.y)))
                assert greater >= max(24, 1.5 * lesser)
                asked += 1
    assert asked > 60


def test_a_caption_names_every_thing_once_and_scores_one() -> None:
    for seed in range(50):
        scene = draw_scene((10, seed))
        assert sum(things_named(caption(scene)).values()) == len(scene.things)
        assert object_f1(caption(scene), scene) == 1


def test_object_f1_counts_misses_inventions_and_wrong_digits() -> None:
    circle = Thing("circle", "red", 30, 30, 20, 0)
    card = Thing("card", "blue", 100, 100, 50, 4, digit=7)
    scene = scene_of(circle, card)
    assert object_f1("At the top left a red circle.", scene) == pytest.approx(2 / 3)
    assert object_f1("At the top left a red circle, at the center a blue card with a 1.", scene) == 0.5
    assert object_f1("At the top left a red circle, at the center a red circle.", scene_of(circle)) == pytest.approx(
        2 / 3
    )
    assert object_f1("Nothing to be seen.", scene) == 0


def test_scenes_of_two_splits_differ_on_cards_alone() -> None:
    for seed in range(30):
        tested, *others = (draw_scene((13, seed), split) for split in ("test", "validation", "train"))
        cards = [number for number, thing in enumerate(tested.things) if thing.shape == "card"]
        elsewhere = ~np.isin(tested.owner, cards)
        for other in others:
            assert other.things == tested.things
            np.testing.assert_array_equal(other.image[elsewhere], tested.image[elsewhere])


def test_training_alone_bends_the_handwriting(monkeypatch: pytest.MonkeyPatch) -> None:
    of_test = scenes._digit_samples("test")
    monkeypatch.setattr(scenes, "_digit_samples", lambda split: of_test)
    bent = 0
    for seed in range(30):
        drawn = {split: draw_scene((13, seed), split) for split in get_args(Split)}
        np.testing.assert_array_equal(drawn["validation"].image, drawn["test"].image)
        for number, thing in enumerate(drawn["test"].things):
            if thing.shape == "card":
                there = drawn["test"].owner == number
                assert not np.array_equal(drawn["train"].image[there], drawn["test"].image[there])
                bent += 1
    assert bent > 10


def test_bending_moves_the_ink_a_little_and_differently_each_time() -> None:
    y, x = np.mgrid[-4:4:17j, -4:4:17j].astype(np.float32)
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(50):
        bent_x, bent_y, gain = scenes._bend(x, y, rng)
        assert 1 <= gain <= 2
        moved.append(np.hypot(bent_x - x, bent_y - y))
    shift = np.stack(moved)
    assert shift.mean((1, 2)).min() > 0.05
    assert shift.max() < 4  # half the glyph
    assert shift.std(0).min() > 0.05
