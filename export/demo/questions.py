"""What is asked of a scene, and the one right answer.

Tasks: ``caption``, ``existence`` (balanced yes/no), ``attribute`` (colour, shape, size), ``counting``, ``digit``,
``relation``; ``place`` is asked in training only. Things are named by words that fit one thing of the scene alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .scenes import COLORS, PLACES, SHAPES, SIDE, Scene, Thing

TASKS = ("existence", "attribute", "digit", "relation", "counting", "caption")

WORDING = {
    "caption": ("Describe the image.", "Describe this picture.", "What is in the image?", "Write a caption.",
                "What does the picture show?", "Caption this image."),
    "existence": ("Is there a {name}?", "Is there a {name} in the image?", "Does the picture show a {name}?",
                  "Can you see a {name}?"),
    "color": ("What color is the {name}?", "Which color does the {name} have?"),
    "shape": ("What shape is the {name} object?", "What is the shape of the {name} object?"),
    "size": ("Is the {name} small or large?", "How big is the {name}?"),
    "count": ("How many {name} are there?", "How many {name} are in the image?", "Count the {name}."),
    "digit": ("Which digit is on the {name}?", "What digit does the {name} show?", "Read the {name}."),
    "relation": ("Where is the {name} relative to the {other}?", "Where is the {name}, seen from the {other}?"),
    "place": ("Where is the {name}?", "In which part of the image is the {name}?"),
}  # fmt: skip
"""The first wording of each is the one scored; training uses all."""

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_THING = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: with a (\d))?"
_CAPTION_THING = re.compile(rf"\b{_THING}")
_PLACED_THING = re.compile(rf"\bat the ({'|'.join(sorted(PLACES, key=len, reverse=True))}) an? {_THING}")


@dataclass(frozen=True)
class Question:
    """``task`` as scored, ``kind`` the wording's, ``text`` as a user would ask, ``answer`` the exact reply."""

    task: str
    kind: str
    text: str
    answer: str


def caption(scene: Scene) -> str:
    """One sentence naming every thing with its place, in reading order."""
    parts = []
    for thing in scene.things:
        digit = f" with a {thing.digit}" if thing.digit is not None else ""
        article = "an" if thing.color == "orange" else "a"
        parts.append(f"at the {PLACES[thing.cell]} {article} {thing.name}{digit}")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def things_named(text: str) -> Counter[tuple[str, str, str]]:
    """The ``(colour, shape, digit)`` things a caption names."""
    return Counter(_CAPTION_THING.findall(text))


def object_f1(text: str, scene: Scene) -> float:
    """F1 of the things a caption names against the scene's; a card counts only with its digit."""
    truth = things_named(caption(scene))
    said = things_named(text)
    both = sum((truth & said).values())
    return 2 * both / (sum(truth.values()) + sum(said.values()))


def placed_f1(text: str, scene: Scene) -> float:
    """The same, a thing counting only where the caption puts it in its place."""
    truth, said = (Counter(_PLACED_THING.findall(words.lower())) for words in (caption(scene), text))
    both = sum((truth & said).values())
    return 2 * both / (sum(truth.values()) + sum(said.values()))


def ask_all(
    scene: Scene, rng: np.random.Generator, *, vary: bool = True, each: Mapping[str, int] | None = None
) -> list[Question]:
    """Questions about a scene, one of every kind it allows or up to ``each[kind]``; ``vary`` draws the wording too."""
    asked: list[Question] = []
    for kind in ("caption", "existence", "color", "shape", "size", "count", "digit", "relation", "place"):
        seen: set[str] = set()
        for _ in range(each.get(kind, 1) if each else 1):
            question = _ask(kind, scene, rng, vary)
            if question is not None and question.text not in seen:
                seen.add(question.text)
                asked.append(question)
    return asked


def _ask(kind: str, scene: Scene, rng: np.random.Generator, vary: bool) -> Question | None:
    wordings = WORDING[kind]
    wording = wordings[rng.integers(len(wordings))] if vary else wordings[0]
    unique = _uniquely_named(scene)
    if kind == "caption":
        return Question("caption", kind, wording, caption(scene))
    if kind == "existence":
        return _existence(scene, rng, wording)
    if kind == "count":
        return _counting(scene, rng, wording)
    if kind == "color":
        return _pick(rng, "attribute", kind, wording, [
            (thing.shape, thing.color) for thing in scene.things if _only(scene, "shape", thing)
        ])  # fmt: skip
    if kind == "shape":
        return _pick(rng, "attribute", kind, wording, [
            (thing.color, thing.shape) for thing in scene.things if _only(scene, "color", thing)
        ])  # fmt: skip
    if kind == "size":
        return _pick(rng, "attribute", kind, wording, [
            (thing.name, "small" if thing.small else "large") for thing in unique if thing.digit is None
        ])  # fmt: skip
    if kind == "digit":
        cards = [(thing.name, str(thing.digit)) for thing in unique if thing.digit is not None]
        return _pick(rng, "digit", kind, wording, cards)
    if kind == "place":
        return _pick(rng, "place", kind, wording, [(thing.name, PLACES[thing.cell]) for thing in unique])
    pairs = [
        (thing.name, other.name, side)
        for thing in unique
        for other in unique
        if thing is not other and (side := _side(thing, other)) is not None
    ]
    if not pairs:
        return None
    name, other_name, side = pairs[rng.integers(len(pairs))]
    return Question("relation", kind, wording.format(name=name, other=other_name), side)


def _fill(wording: str, name: str) -> str:
    return wording.format(name=name).replace(" a orange", " an orange")


def _pick(
    rng: np.random.Generator, task: str, kind: str, wording: str, choices: list[tuple[str, str]]
) -> Question | None:
    if not choices:
        return None
    name, answer = choices[rng.integers(len(choices))]
    return Question(task, kind, _fill(wording, name), answer)


def _uniquely_named(scene: Scene) -> list[Thing]:
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def _only(scene: Scene, trait: str, thing: Thing) -> bool:
    return sum(getattr(other, trait) == getattr(thing, trait) for other in scene.things) == 1


def _side(thing: Thing, other: Thing) -> str | None:
    """Where ``thing`` lies from ``other``, if one direction clearly prevails."""
    right, down = thing.x - other.x, thing.y - other.y
    if max(abs(right), abs(down)) < SIDE / 8 or max(abs(right), abs(down)) < 1.5 * min(abs(right), abs(down)):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


def _existence(scene: Scene, rng: np.random.Generator, wording: str) -> Question:
    """Half yes. Half of the noes recombine a colour and a shape that are both there, where the scene allows it."""
    present = {(thing.color, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        color, shape = sorted(present)[rng.integers(len(present))]
        return Question("existence", "existence", _fill(wording, f"{color} {shape}"), "yes")
    colors, shapes = {color for color, _ in present}, {shape for _, shape in present}
    crossed = sorted({(color, shape) for color in colors for shape in shapes} - present)
    absent = sorted({(color, shape) for color in COLORS for shape in SHAPES} - present)
    pool = crossed if crossed and rng.random() < 0.5 else absent
    color, shape = pool[rng.integers(len(pool))]
    return Question("existence", "existence", _fill(wording, f"{color} {shape}"), "no")


def _counting(scene: Scene, rng: np.random.Generator, wording: str) -> Question:
    """All objects, those of a shape, or those of a colour; the trait is usually one that is there."""
    choice = rng.integers(3)
    if choice == 0:
        return Question("counting", "count", wording.format(name="objects"), str(len(scene.things)))
    thing = scene.things[rng.integers(len(scene.things))]
    if choice == 1:
        shape = thing.shape if rng.random() < 0.85 else str(rng.choice(SHAPES))
        count = sum(other.shape == shape for other in scene.things)
        return Question("counting", "count", wording.format(name=PLURALS[shape]), str(count))
    color = thing.color if rng.random() < 0.85 else str(rng.choice(list(COLORS)))
    count = sum(other.color == color for other in scene.things)
    return Question("counting", "count", wording.format(name=f"{color} objects"), str(count))
