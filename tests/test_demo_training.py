"""Training of the demo model: what a packed sequence trains, what a checkpoint holds, which pools are taken."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.export.demo import dialogue as talk
from edge_tokcomp.export.demo import pool as pools
from edge_tokcomp.export.demo import train
from edge_tokcomp.export.demo.dense import pixels_of
from edge_tokcomp.export.demo.from_gguf import write_vocabulary
from edge_tokcomp.export.demo.model import GRID, DemoVLM, LanguageShape, TowerShape
from edge_tokcomp.export.demo.pool import Pool, draw_part, draw_pool
from edge_tokcomp.export.demo.scenes import Scene, Split, draw_scene
from edge_tokcomp.export.demo.train import STAGES, Stage, Trainer, write_checkpoint
from edge_tokcomp.export.demo.vocabulary import AFTER_IMAGE, BEFORE_IMAGE, BOS, EOS, Vocabulary
from edge_tokcomp.models import DEMO_LM

SCENES = 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in: a pool of ``SCENES`` scenes and the vocabulary of the bundled model."""
    folder = tmp_path_factory.mktemp("training")
    draw_part(folder / "pool", 0, SCENES)
    write_vocabulary(DEMO_LM, folder / "vocabulary.model")
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """The same without a checkpoint, for one test alone."""
    (tmp_path / "pool").symlink_to(drawn / "pool")
    (tmp_path / "vocabulary.model").symlink_to(drawn / "vocabulary.model")
    return tmp_path


def tiny_model() -> DemoVLM:
    torch.manual_seed(0)
    return DemoVLM(
        TowerShape(width=32, blocks=1, heads=2, hidden=64), LanguageShape(width=32, blocks=2, heads=2, hidden=64)
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_question_packed_among_others_gets_the_logits_it_gets_alone(drawn: Path, shuffled: bool) -> None:
    vocabulary = Vocabulary(drawn / "vocabulary.model")
    images, _, things = Pool(drawn / "pool").batch([0, 1])
    dialogue = talk.build(vocabulary, things, np.random.default_rng(0))
    order = torch.from_numpy(np.random.default_rng(1).permutation(GRID * GRID)) if shuffled else torch.arange(GRID**2)
    model = tiny_model().eval()
    with torch.no_grad():
        features = model.v(pixels_of(images))
        states = talk.hidden_states(model, vocabulary, features, dialogue, order if shuffled else None)
        packed = model.lm.output(states)
        for row, spans in enumerate(dialogue.questions):
            assert len(spans) > 5
            for question, start, stop in spans:
                prompt = vocabulary.encode(AFTER_IMAGE.format(question=question.text))
                answer = [*vocabulary.encode(f" {question.answer}"), EOS]
                lead = torch.tensor([BOS, *vocabulary.encode(BEFORE_IMAGE)])
                rows = torch.cat([
                    model.lm.token_embd(lead), model.mm(features[row, 1:][order]),
                    model.lm.token_embd(torch.tensor([*prompt, *answer[:-1]])),
                ])[None]  # fmt: skip
                alone = model.lm(rows, torch.arange(rows.shape[1])[None], rows.shape[1], None)
                alone = model.lm.output(alone[0, -len(answer) :])
                torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-4, atol=1e-4)
                assert dialogue.targets[row, start:stop].tolist() == answer
    learnt = sum(stop - start for spans in dialogue.questions for _, start, stop in spans)
    assert int((dialogue.targets >= 0).sum()) == learnt


class BrokenOffError(Exception):
    """Stands for whatever ends a process."""


STAGES_OF_TEST = (Stage("language", 1, 2, 1e-2, 0.0), Stage("joint", 4, 2, 1e-2, 0.5))


def weights_after(folder: Path, stages: tuple[Stage, ...]) -> dict[str, torch.Tensor]:
    model = tiny_model()
    Trainer(folder, model, stages, compiled=False).run()
    return model.state_dict()


def test_training_resumed_from_its_checkpoint_ends_where_uninterrupted_training_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after two of four joint steps, and gone on with in a fresh trainer."""
    expected = weights_after(folder, STAGES_OF_TEST)
    (folder / "checkpoint.pt").unlink()
    monkeypatch.setattr(train, "SAVE_EVERY", -1.0)
    loss, steps = Trainer._loss, []

    def break_off(self: Trainer, stage: Stage, rng: np.random.Generator) -> object:
        if len(steps) == 3:
            raise BrokenOffError
        steps.append(stage.name)
        return loss(self, stage, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", break_off)
        with pytest.raises(BrokenOffError):
            weights_after(folder, STAGES_OF_TEST)
    assert steps == ["language", "joint", "joint"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["step"], state["pool"]) == (1, 2, SCENES)
    begun = tiny_model().state_dict()
    for name, weight in weights_after(folder, STAGES_OF_TEST).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(weight, state["model"][name]), name
        assert not torch.equal(weight, begun[name]), name


def test_every_stage_trains_what_it_says(folder: Path) -> None:
    """``windows`` and ``scenes`` leave the language model alone, ``language`` the tower."""
    for name, frozen in (("windows", ("lm.", "mm.")), ("scenes", ("lm.", "mm.")), ("language", ("v.", "aid."))):
        stage = next(stage for stage in STAGES if stage.name == name)
        before = tiny_model().state_dict()
        after = weights_after(folder, (Stage(name, 1, 2, stage.rate, stage.tower),))
        (folder / "checkpoint.pt").unlink()
        moved = {key.split(".")[0] + "." for key in after if not torch.equal(before[key], after[key])}
        assert moved == {"v.", "mm.", "lm.", "aid."} - set(frozen)


def test_checks_during_training_draw_validation_handwriting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []

    def noting(seed: tuple[int, ...], split: Split) -> Scene:
        splits.append(split)
        return draw_scene(seed, split)

    monkeypatch.setattr(train, "draw_scene", noting)
    scores = Trainer(folder, tiny_model(), STAGES, compiled=False).check(scenes=2, batch=2)
    assert splits == ["validation", "validation"]
    assert {"caption", "existence", "count"} <= set(scores)


def test_a_checkpoint_of_another_pool_is_refused_in_one_line(folder: Path) -> None:
    model = tiny_model()
    write_checkpoint(folder, model, SCENES + 1, stage=0, step=0, optimizers=[])
    with pytest.raises(
        TokcompError, match=rf"checkpoint\.pt was trained on {SCENES + 1} scenes, .*pool holds {SCENES}"
    ):
        Trainer(folder, model, STAGES, compiled=False)


def test_training_goes_on_from_weights_written_without_optimisers(folder: Path) -> None:
    model = tiny_model()
    write_checkpoint(folder, model, SCENES, stage=1, step=0, optimizers=[])
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.v.class_embd)
    trainer = Trainer(folder, other, STAGES, compiled=False)
    assert (trainer.stage, trainer.step) == (1, 0)
    assert torch.equal(other.v.class_embd, model.v.class_embd)


def test_a_finished_pool_is_not_drawn_again(drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (drawn / "pool").iterdir()}
    draw_pool(drawn / "pool", processes=1, parts=1, scenes=SCENES)
    assert {path: path.stat().st_mtime_ns for path in (drawn / "pool").iterdir()} == before


@pytest.mark.parametrize("content", [[], {"drawing": pools.DRAWING - 1, "things": []}])
def test_a_pool_of_other_drawing_code_is_refused_in_one_line(
    tmp_path: Path, content: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_part(tmp_path / "pool", 0, 1)
    (tmp_path / "pool" / "000.json").write_text(json.dumps(content))
    wrong = rf"000\.json has .*version.* this code draws version {pools.DRAWING}: delete .*pool to draw it anew"
    with pytest.raises(TokcompError, match=wrong):
        Pool(tmp_path / "pool")
    with pytest.raises(TokcompError, match=wrong):
        draw_pool(tmp_path / "pool", processes=1, parts=2, scenes=1)
    (tmp_path / "vocabulary.model").touch()
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path), "--threads", str(torch.get_num_threads())])
    with pytest.raises(SystemExit, match=wrong) as stop:
        train.main()
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("fails", ["draw_scene", "np.save", "json.dumps", "os.replace"])
def test_a_part_that_was_not_finished_does_not_count(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise BrokenOffError

    with monkeypatch.context() as patch:
        patch.setattr(f"{pools.__name__}.{fails}", crash)
        with pytest.raises(BrokenOffError):
            draw_part(tmp_path, 0, 2)
    assert len(Pool(tmp_path)) == 0
    draw_part(tmp_path, 0, 2)
    assert len(Pool(tmp_path)) == 2


def test_what_a_part_holds_changes_only_with_the_drawing_version(drawn: Path) -> None:
    """Another result here means other scenes for the same seeds: raise ``DRAWING``, and write down the new figures."""
    assert pools.DRAWING == 2
    images, owners, things = Pool(drawn / "pool").batch(range(6))
    sums = [sum(thing.x + 2 * thing.y + 3 * thing.size for thing in scene) for scene in things]
    assert [thing.digit for thing in things[0]] == [1, 6, 9]
    assert sums == pytest.approx([1435.9907, 543.6798, 2232.0253, 582.0254, 2000.1032, 2012.1600], abs=1e-3)
    assert images.mean((1, 2, 3)) == pytest.approx([124.56, 102.86, 118.45, 48.94, 94.30, 110.47], abs=0.02)
    assert (owners >= 0).sum(1) == pytest.approx([138, 6, 129, 40, 70, 86], abs=1)
