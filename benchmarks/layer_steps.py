"""Layer steps on the demo tasks: image rows dropped between the layers of the demo's language model, run in NumPy.

    python benchmarks/layer_steps.py --steps "spectrum@1:0.5,2:0.25,3:0" "fastv@1:0.5" [--method mosaic --keep 128]

Scores on tuning scenes (digits of the validation split, seeds of their own), so that a step's free parameters may be
chosen by it. Prints a table: mean of the tasks and each of them, and image rows averaged over the layers. What runs is
the dequantised GGUF in float32; rows left are renumbered without gaps, as stock llama.cpp needs them. Layers are
whole numbers below 4 here, the depth of the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.evaluation import PLACED, TUNING_SEEDS, summarise
from edge_tokcomp.export.demo.questions import TASKS, ask_all, object_f1
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.methods import get_method
from edge_tokcomp.methods.layer_step import LayerState, LayerStep
from edge_tokcomp.methods.layer_steps import read_layer_step
from edge_tokcomp.vlm import VLM, load

LONGEST_ANSWER = 96

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights of one decoder layer, ``(out, in)`` each, queries and keys in llama.cpp's order of pairs."""

    attn_norm: Floats
    qkv: Floats
    attn_output: Floats
    ffn_norm: Floats
    gate_up: Floats
    ffn_down: Floats


class Language:
    """A llama-architecture model of plain attention heads."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        weights = {
            tensor.name: np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(
                tuple(reversed(tensor.shape.tolist()))
            )
            for tensor in reader.tensors
        }
        fields = {name.split(".", 1)[-1]: field.contents() for name, field in reader.fields.items()}
        self.heads, self.depth = int(fields["attention.head_count"]), int(fields["block_count"])
        self.eps = float(fields["attention.layer_norm_rms_epsilon"])
        self.table, self.final_norm = weights["token_embd.weight"], weights["output_norm.weight"]
        self.output = weights["output.weight"]
        self.layers = []
        for number in range(self.depth):
            part = {name: weights[f"blk.{number}.{name}.weight"] for name in (
                "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
            )}  # fmt: skip
            self.layers.append(Layer(
                part["attn_norm"], np.concatenate([part["attn_q"], part["attn_k"], part["attn_v"]]),
                part["attn_output"], part["ffn_norm"], np.concatenate([part["ffn_gate"], part["ffn_up"]]),
                part["ffn_down"],
            ))  # fmt: skip
        width = self.table.shape[1] // self.heads
        self.rate = float(fields.get("rope.freq_base", 10000.0)) ** (-np.arange(width // 2) / (width // 2))

    def norm(self, x: Floats, weight: Floats) -> Floats:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.eps)) * weight

    def project(self, layer: Layer, x: Floats, start: int) -> tuple[Floats, Floats, Floats]:
        """``(heads, n, dim)`` queries, keys (both rotated to positions from ``start``) and values."""
        qkv = (self.norm(x, layer.attn_norm) @ layer.qkv.T).reshape(len(x), 3, self.heads, -1).transpose(1, 2, 0, 3)
        angle = (start + np.arange(len(x)))[:, None] * self.rate
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = qkv[:2, ..., 0::2], qkv[:2, ..., 1::2]
        turned = np.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1).reshape(qkv[:2].shape)
        return turned[0], turned[1], qkv[2]

    def finish(self, layer: Layer, x: Floats, mixed: Floats) -> Floats:
        x = x + mixed.transpose(1, 0, 2).reshape(x.shape) @ layer.attn_output.T
        gate, up = np.split(self.norm(x, layer.ffn_norm) @ layer.gate_up.T, 2, axis=1)
        return x + (gate / (1 + np.exp(-gate)) * up) @ layer.ffn_down.T


def attend(query: Floats, key: Floats, first: int) -> Floats:
    """Causal softmax weights ``(heads, n, m)``; query i stands at row ``first + i`` of the m."""
    scores = query @ key.transpose(0, 2, 1) / np.float32(np.sqrt(query.shape[2]))
    rows, columns = np.arange(query.shape[1]) + first, np.arange(key.shape[1])
    scores = np.where(columns[None, :] <= rows[:, None], scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def answer(
    model: Language, lead: Floats, image: Floats, text: Floats, steps: Sequence[LayerStep], ends: set[int]
) -> tuple[list[int], list[int]]:
    """Greedy tokens after ``lead``, ``image`` and ``text`` rows, and the image rows that each layer saw."""
    at = {number: (step, amount) for step in steps for number, amount in step.layers(model.depth).items()}
    x = np.concatenate([lead, image, text])
    left = np.arange(len(lead), len(lead) + len(image))
    crop = np.zeros(len(image), np.int64)
    cache: list[tuple[Floats, Floats]] = []
    previous: Floats | None = None
    keys = np.zeros(0, np.float32)
    seen = []
    for number, layer in enumerate(model.layers):
        words = np.arange(left[-1] + 1 if len(left) else len(lead), len(x))
        if number in at:
            step, amount = at[number]
            if step.attention == "next":
                query, key, _ = model.project(layer, x, 0)
                previous = attend(query[:, words], key, int(words[0])).mean(axis=0)
            state = LayerState(
                x[left], crop, len(image), left, words,
                None if previous is None or step.attention == "none" else previous,
                keys, x[words], model.final_norm,
            )  # fmt: skip
            stay = step.survivors(state, amount)
            x = np.concatenate([x[: len(lead)], x[left[stay]], x[words]])
            crop, left = crop[stay], np.arange(len(lead), len(lead) + len(stay))
        seen.append(len(left))
        query, key, value = model.project(layer, x, 0)
        weights = attend(query, key, 0)
        previous, keys = weights.mean(axis=0)[len(lead) + len(left) :], np.abs(key).sum(axis=(0, 2))
        cache.append((key, value))
        x = model.finish(layer, x, weights @ value)
    tokens: list[int] = []
    row = x[-1:]
    while True:
        tokens.append(int(np.argmax(model.output @ model.norm(row, model.final_norm)[0])))
        if tokens[-1] in ends or len(tokens) == LONGEST_ANSWER:
            return tokens, seen
        row = model.table[tokens[-1:]]
        for number, layer in enumerate(model.layers):
            query, key, value = model.project(layer, row, cache[number][0].shape[1])
            cache[number] = tuple(np.concatenate([old, new], axis=1) for old, new in zip(cache[number], (key, value), strict=True))  # type: ignore[assignment]  # fmt: skip # noqa: E501
            row = model.finish(layer, row, attend(query, cache[number][0], cache[number][0].shape[1] - 1) @ cache[number][1])  # fmt: skip # noqa: E501


def score(vlm: VLM, model: Language, arms: Sequence[Sequence[LayerStep]], scenes: int) -> tuple[list[dict[str, NDArray[np.float64]]], list[float]]:  # fmt: skip # noqa: E501
    """Scores of every arm by task and scene, and its image rows averaged over layers and questions."""
    sums = [{task: np.zeros((scenes, 2)) for task in TASKS} for _ in arms]
    rows, asked = np.zeros(len(arms)), 0
    ends = {token for token in range(len(model.table)) if vlm.model.is_end(token)}
    for index in range(scenes):
        scene = draw_scene((TUNING_SEEDS[0], 0, index), "validation")
        seen = vlm.encode(scene.image)
        for question in ask_all(scene, np.random.default_rng((TUNING_SEEDS[1], 0, index)), vary=False):
            if question.task in PLACED:
                continue
            encoded = vlm.encode(seen, question.text)
            lead, text = (vlm.embedding.lookup(p) for p in chat_prompt(vlm.model, question.text, 1).tokenize(vlm.model))
            asked += 1
            for number, steps in enumerate(arms):
                tokens, layers = answer(model, lead, encoded.rows, text, steps, ends)
                rows[number] += np.mean(layers)
                said = vlm.model.detokenize(np.array([t for t in tokens if t not in ends], np.int32)).strip()
                if question.task == "caption":
                    right = object_f1(said, scene)
                else:
                    right = float(said.rstrip(".").lower() == question.answer.lower())
                sums[number][question.task][index] += (right, 1)
    with np.errstate(invalid="ignore"):
        return [{task: s[:, 0] / s[:, 1] for task, s in arm.items()} for arm in sums], (rows / asked).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", nargs="*", default=[], help="one arm each; several steps of an arm joined by '+'")
    parser.add_argument("--method", default="none")
    parser.add_argument("--keep")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    arms = [[], *([read_layer_step(part) for part in text.split("+")] for text in options.steps)]
    with load(method=get_method(options.method), keep=options.keep, threads=options.threads) as vlm:
        scores, rows = score(vlm, Language(vlm.lm), arms, options.scenes)
    print(f"{options.method} {options.keep or ''}, {options.scenes} tuning scenes, per cent")
    print(f"| steps | rows a layer | mean | {' | '.join(TASKS)} |")
    print("|---" * (3 + len(TASKS)) + "|")
    for name, result, count in zip(["none", *options.steps], scores, rows, strict=True):
        cells = {task: summarise(values)["score"] for task, values in result.items()}
        mean = np.mean([cells[task] for task in TASKS if task not in PLACED])
        print(f"| `{name}` | {count:.0f} | {100 * mean:.1f} | {' | '.join(f'{100 * v:.1f}' for v in cells.values())} |")
    if options.out:
        document = [
            {"steps": name, "rows": count, "scores": {task: values.tolist() for task, values in result.items()}}
            for name, result, count in zip(["none", *options.steps], scores, rows, strict=True)
        ]
        options.out.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
