"""Train the demo VLM from nothing, in five resumable stages.

    python -m edge_tokcomp.export.demo.train FOLDER

``windows``: the tower alone, per-patch targets, on 12 x 12-patch windows. ``scenes``: the same on whole scenes, with
CLS told to name what is there. ``language``: projector and language model, on questions and captions over all 576 image
tokens. ``joint``: the same with the tower, its per-patch targets kept on. ``finish``: more of ``joint``, at a lower
rate. Nothing is ever pruned in training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edge_tokcomp.errors import TokcompError

from . import dialogue as talk
from .dense import dense_loss, dense_targets, pixels_of, windows
from .model import GRID, DemoVLM, LanguageShape, TowerShape
from .pool import Pool, draw_pool
from .scenes import draw_scene
from .vocabulary import Vocabulary, train_vocabulary

CHECK_SEED = 2
SAVE_EVERY = 120.0


@dataclass(frozen=True)
class Stage:
    """One stretch of training: ``rate`` is the peak learning rate, falling along a cosine to a twentieth."""

    name: str
    steps: int
    batch: int
    rate: float
    tower: float
    """The tower's share of the rate; 0 freezes it."""


STAGES = (
    Stage("windows", 800, 96, 3e-3, 1.0),
    Stage("scenes", 600, 32, 2e-3, 1.0),
    Stage("language", 700, 24, 2e-3, 0.0),
    Stage("joint", 1450, 24, 1.5e-3, 0.5),
    Stage("finish", 2000, 24, 1e-3, 0.5),
)


class Trainer:
    """Model, optimisers and the place in the schedule; all of it in one checkpoint.

    ``folder`` holds ``pool/``, ``vocabulary.model`` and, once saved, ``checkpoint.pt``, which ``model`` then takes its
    weights from. ``TokcompError`` if the checkpoint was trained on a pool of another size.
    """

    def __init__(self, folder: Path, model: DemoVLM, stages: Sequence[Stage], *, compiled: bool) -> None:
        self.folder, self.model, self.stages = folder, model, stages
        self.pool = Pool(folder / "pool")
        self.vocabulary = Vocabulary(folder / "vocabulary.model")
        self.stage, self.step = 0, 0
        self.optimizers = self._optimizers()
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            if state.get("pool") != len(self.pool):  # each step draws its scenes from the whole pool
                trained = state.get("pool", "an unknown number of")
                raise TokcompError(
                    f"{checkpoint} was trained on {trained} scenes, {folder / 'pool'} holds {len(self.pool)}: "
                    "bring back that pool, or delete the checkpoint to train from nothing"
                )
            self.model.load_state_dict(state["model"])
            self.stage, self.step = state["stage"], state["step"]
            if self.step:
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
        if compiled:
            self.model.v.compile(dynamic=False)
            self.model.lm.compile(dynamic=False)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the hidden matrices, AdamW for everything else; the tower in groups of its own."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim == 2 and (".blk." in name or name.startswith("mm."))
            groups.setdefault(("muon" if hidden else "adam", name.startswith("v.")), []).append(parameter)

        def group(kind: str) -> list[dict[str, object]]:
            return [{"params": groups[kind, tower], "tower": tower} for tower in (True, False)]

        return [
            torch.optim.Muon(group("muon"), weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(group("adam"), weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def save(self) -> None:
        """Write ``checkpoint.pt``."""
        write_checkpoint(self.folder, self.model, len(self.pool), self.stage, self.step, self.optimizers)

    def run(self) -> None:
        """Go on from the checkpoint to the end of the last stage."""
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            self._run_stage(stage)
            self.stage, self.step = self.stage + 1, 0
            self.optimizers = self._optimizers()
            self.save()

    def _run_stage(self, stage: Stage) -> None:
        saved = started = time.monotonic()
        begun, log = self.step, Average()
        for parameter in self.model.v.parameters():
            parameter.requires_grad_(stage.tower > 0)
        while self.step < stage.steps:
            warm = min(1.0, (self.step + 1) / 50)
            rate = stage.rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.step / stage.steps)))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (stage.tower if group["tower"] else 1.0)
            rng = np.random.default_rng((3, self.stage, self.step))
            with torch.autocast("cpu", torch.bfloat16):
                loss, seen = self._loss(stage, rng)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            log.add({"loss": loss.item(), **seen})
            if self.step % 25 == 0:
                speed = (self.step - begun) * stage.batch / (time.monotonic() - started)
                print(f"{stage.name} {self.step}/{stage.steps} {log} images/s {speed:.1f}", flush=True)
                log = Average()
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
            if stage.name in ("language", "joint", "finish") and self.step % 200 == 0:
                print(json.dumps({"step": self.step, **self.check()}), flush=True)

    def _loss(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        images, owners, things = self.pool.batch(rng.integers(len(self.pool), size=stage.batch).tolist())
        if stage.name == "windows":
            pixels, cells, targets = windows(images, owners, things, rng)
            return dense_loss(self.model.aid, self.model.v(pixels, cells), targets, whole=False)
        features = self.model.v(pixels_of(images))
        if stage.name == "scenes":
            return dense_loss(self.model.aid, features, dense_targets(owners, things), whole=True)
        dialogue = talk.build(self.vocabulary, things, rng)
        order = torch.from_numpy(rng.permutation(GRID * GRID))
        states = talk.hidden_states(self.model, self.vocabulary, features, dialogue, order)
        loss, right = talk.dialogue_loss(self.model, states, dialogue)
        seen = {kind: float(np.mean(marks)) for kind, marks in talk.scores(dialogue, right).items()}
        if stage.tower:
            dense, _ = dense_loss(self.model.aid, features, dense_targets(owners, things), whole=True)
            seen["dense"] = dense.item()
            loss = loss + 0.5 * dense
        return loss, seen

    @torch.no_grad()
    def check(self, scenes: int = 192, batch: int = 24) -> dict[str, float]:
        """Exact-match scores on fresh scenes, digits of the validation split; teacher-forced, so high for captions."""
        marks: dict[str, list[bool]] = {}
        for start in range(0, scenes, batch):
            drawn = [draw_scene((CHECK_SEED, start + index), "validation") for index in range(batch)]
            dialogue = talk.build(self.vocabulary, [s.things for s in drawn], np.random.default_rng((4, start)))
            with torch.autocast("cpu", torch.bfloat16):
                features = self.model.v(pixels_of(np.stack([scene.image for scene in drawn])))
                states = talk.hidden_states(self.model, self.vocabulary, features, dialogue)
                _, right = talk.dialogue_loss(self.model, states, dialogue)
            for kind, values in talk.scores(dialogue, right).items():
                marks.setdefault(kind, []).extend(values)
        return {kind: round(float(np.mean(values)), 3) for kind, values in marks.items()}


def write_checkpoint(
    folder: Path, model: DemoVLM, pool: int, stage: int, step: int, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Write what a ``Trainer`` on a pool of ``pool`` scenes goes on from, whole or not at all."""
    partial = folder / "checkpoint.partial"
    torch.save({
        "model": model.state_dict(), "pool": pool, "stage": stage, "step": step,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }, partial)  # fmt: skip
    os.replace(partial, folder / "checkpoint.pt")


class Average:
    """Running means of named figures, for the log."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self.sums.setdefault(name, []).append(value)

    def items(self) -> Iterator[tuple[str, float]]:
        return ((name, sum(values) / len(values)) for name, values in self.sums.items())

    def __str__(self) -> str:
        return " ".join(f"{name} {value:.3f}" for name, value in self.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="pool, vocabulary and checkpoint live here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "vocabulary.model").exists():
        train_vocabulary(options.folder / "vocabulary.model")
    torch.manual_seed(0)
    model = DemoVLM(TowerShape(), LanguageShape())
    try:
        draw_pool(options.folder / "pool", options.threads)
        trainer = Trainer(options.folder, model, STAGES, compiled=options.compile)
    except TokcompError as fault:
        raise SystemExit(str(fault)) from fault
    trainer.run()


if __name__ == "__main__":
    main()
