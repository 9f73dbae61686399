from __future__ import annotations

import numpy as np
import pytest

from edge_tokcomp.export.demo.questions import (
    TASKS,
    WORDING,
    Question,
    ask_all,
    caption,
    object_f1,
    things_named,
)
from edge_tokcomp.export.demo.scenes import COLORS, PLACES, SHAPES, SIDE, Scene, Thing, _digit_samples, draw_scene


def scene_of(*things: Thing) -> Scene:
    return Scene(np.zeros((SIDE, SIDE, 3), np.uint8), things, np.full((SIDE, SIDE), -1, np.int8))


def test_the_same_seed_draws_the_same_scene_and_another_seed_another() -> None:
    first, again, other = draw_scene((5, 1)), draw_scene((5, 1)), draw_scene((5, 2))
    assert np.array_equal(first.image, again.image)
    assert first.things == again.things
    assert not np.array_equal(first.image, other.image)


def test_no_handwriting_sample_is_in_both_splits() -> None:
    for digit in range(10):
        train, test = (set(_digit_samples(split)[digit].tolist()) for split in ("train", "test"))
        assert train
        assert test
        assert not train & test


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
    other = next(t for t in scene.things if t.color == colors[1] and t.shape == shapes[1])
    right, down = named[0].x - other.x, named[0].y - other.y
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


def test_only_training_bends_the_handwriting_and_nothing_else_of_a_scene() -> None:
    bent = 0
    for seed in range(40):
        trained, tested = draw_scene((13, seed), "train"), draw_scene((13, seed), "test")
        assert trained.things == tested.things
        cards = [number for number, thing in enumerate(trained.things) if thing.shape == "card"]
        elsewhere = ~np.isin(trained.owner, cards)
        np.testing.assert_array_equal(trained.image[elsewhere], tested.image[elsewhere])
        bent += bool(cards) and not np.array_equal(trained.image, tested.image)
    assert bent > 5
