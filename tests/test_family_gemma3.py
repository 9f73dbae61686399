"""Gemma 3 against transformers, on a tiny model as two GGUF files: rows of a picture see one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image

from cut_models import Watched
from edge_tokcomp.answers import Answer
from edge_tokcomp.errors import TokcompError
from edge_tokcomp.families import family_for
from edge_tokcomp.language.decoder import PlainDecoder
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import ImagePiece, MtmdEncoder, TextPiece
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.language.sampling import Sampling
from edge_tokcomp.language.segmented import SegmentedDecoder
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.methods.layer_steps import read_layer_steps
from edge_tokcomp.prompt_rows import prompt_parts, rows_of
from family_proof import Proof, assert_same_rows, assert_same_text, error, our_greedy, photo
from hf_language import text_model
from hf_processors import make_processor, make_tokenizer
from hf_vlms import HALF, build
from tiny_models import write_tiny_model

SIZES = ((64, 64), (100, 60), (203, 151), (31, 330), (5, 7))
TOKENS = 16


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof.make("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_processors(proof: Proof, size: tuple[int, int]) -> None:
    wanted = proof.asked([photo(*size)], "q")["pixel_values"][0].numpy()
    np.testing.assert_allclose(proof.family.preprocess(photo(*size), proof.spec).crops[0], wanted, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_those_of_tower_and_projector(proof: Proof, size: tuple[int, int]) -> None:
    with torch.no_grad():
        features = proof.model.get_image_features(proof.asked([photo(*size)], "q")["pixel_values"]).pooler_output
    assert_same_rows(proof, photo(*size), features[0].numpy())


def test_lower_resolutions_stretch_the_table_of_positions_as_transformers_does(proof: Proof) -> None:
    pixels = proof.family.preprocess(photo(203, 151), proof.spec, (2, 3))
    assert pixels.grids == ((2, 3),)
    projector = proof.model.model.multi_modal_projector
    with torch.no_grad():
        tower = proof.model.model.vision_tower
        patches = tower(torch.from_numpy(pixels.crops[0])[None], interpolate_pos_encoding=True).last_hidden_state[0]
        pooled = torch.nn.functional.avg_pool2d(patches.T.reshape(-1, 8, 12), 4).flatten(1).T
        wanted = projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight
    with proof.open() as vlm:
        found = vlm.engine.tower.project(vlm.engine.tower.encode(pixels.crops[0][None]).features[0])
    assert error(found, wanted) <= 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_prompt_and_picture_give_the_same_text(proof: Proof, size: tuple[int, int]) -> None:
    assert_same_text(proof, [photo(*size)])


def test_two_pictures_see_themselves_and_what_stands_before(proof: Proof) -> None:
    assert_same_text(proof, [photo(90, 60), photo(60, 100, seed=1)], "which is larger")


def test_a_further_question_goes_on_from_the_rows_that_are_there(proof: Proof) -> None:
    images = [photo(90, 60), photo(60, 100, seed=1)]
    with proof.open() as vlm:
        encoded = vlm.encode_all(images)
        our_greedy(vlm, encoded, "which is larger", 2)
        held, before = vlm.asker._held, vlm.decoder.length(0)
        said, logits = our_greedy(vlm, encoded, "what is this", 8)
        assert vlm.asker._held == held
        assert vlm.decoder.length(0) == before
    theirs, wanted = proof.greedy(images, "what is this", 8)
    assert said == theirs
    assert error(logits, wanted) <= 5e-3


@pytest.mark.parametrize("method", ["divprune", "uniform"])
def test_kept_rows_see_one_another(proof: Proof, method: str) -> None:
    picture, question = photo(203, 151), "what is this"
    with proof.open(method=method, keep=0.5) as vlm:
        encoded = vlm.encode(picture, question)
        _, logits = our_greedy(vlm, [encoded], question, 1)
    assert len(encoded.plan) == TOKENS // 2
    asked = proof.asked([picture], question)
    places = np.flatnonzero(asked["input_ids"][0].numpy() == proof.model.config.image_token_id)
    left = np.delete(np.arange(asked["input_ids"].shape[1]), np.delete(places, encoded.plan.keep))
    with torch.no_grad():
        rows = proof.model.get_input_embeddings()(asked["input_ids"])[0]
        rows[places] = proof.model.get_image_features(asked["pixel_values"]).pooler_output[0]
        # Positions and masks, those of sliding windows too, are then of the rows that are left.
        out = proof.model(inputs_embeds=rows[left][None], token_type_ids=asked["token_type_ids"][:, left])
    assert error(logits[0], out.logits[0, -1]) <= 5e-3


def test_the_text_around_pictures_is_tokenized_with_its_line_breaks(proof: Proof) -> None:
    pictures, question = [photo(20, 30), photo(20, 20)], "what is this"
    with LanguageModel.open(proof.lm) as model:
        prompt = chat_prompt(model, question, 2, proof.family.markers, proof.family.written)
        before, inside, after = proof.family.prompt(proof.family.preprocess(pictures[0], proof.spec))
        assert inside == (0,)
        ours = prompt.around([(str(before), str(after))] * 2).tokenize(model)
    rows = [proof.model.config.image_token_id] * TOKENS
    found = [*ours[0], *rows, *ours[1], *rows, *ours[2]]
    assert found == proof.asked(pictures, question)["input_ids"][0].tolist()


def test_llama_cpp_leaves_out_the_line_breaks_and_fills_up_with_black(proof: Proof) -> None:
    """libmtmd (tools/mtmd/mtmd.cpp, init_vision; mtmd-image.cpp, resize with padding) writes no line breaks around the
    image and keeps the proportions of pictures on a black square. transformers writes them, and stretches. No public
    issue says so."""
    picture = photo(64, 40)
    black = Image.new("RGB", (64, 64))
    black.paste(picture, (0, 12))
    with LanguageModel.open(proof.lm) as model, MtmdEncoder(proof.mmproj, model, threads=1) as encoder:
        assert not encoder.causal
        start, image, end = encoder.encode(np.asarray(picture))
        marks = [
            model.tokenize(t, add_special=False, parse_special=True) for t in ("<start_of_image>", "<end_of_image>")
        ]
    assert isinstance(start, TextPiece)
    assert isinstance(image, ImagePiece)
    assert isinstance(end, TextPiece)
    assert image.n_pos == TOKENS
    assert [start.tokens.tolist(), end.tokens.tolist()] == [mark.tolist() for mark in marks]
    with proof.open() as vlm:
        padded, stretched = (vlm.see(seen).tokens.embeddings for seen in (black, picture))
    assert error(image.embeddings, padded) <= 5e-3
    assert error(image.embeddings, stretched) > 0.1


def test_published_models_take_256_tokens_of_a_picture_of_any_shape() -> None:
    """Gemma 3 4B's sizes; the others' towers are the same."""
    metadata = {
        "clip.projector_type": "gemma3", "clip.vision.image_size": 896, "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 1152, "clip.vision.feed_forward_length": 4304, "clip.vision.block_count": 27,
        "clip.vision.attention.head_count": 16, "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3,
    }  # fmt: skip
    family = family_for(metadata)
    spec = family.spec(metadata, {f"v.blk.{block}.ln1.weight": (1152,) for block in range(27)})
    size = {"size": {"height": 896, "width": 896}, "image_seq_length": 256}
    processor = make_processor("gemma3", make_tokenizer("gemma3"), {**HALF, **size})
    for picture in (photo(896, 896), photo(1000, 333), photo(37, 500)):
        asked = processor(images=[picture], text="<start_of_image>", return_tensors="np")
        pixels = family.preprocess(picture, spec)
        np.testing.assert_allclose(pixels.crops[0], asked["pixel_values"][0], atol=1e-6)
        assert len(family.layout(pixels, spec)) == np.sum(np.asarray(asked["input_ids"]) == 300) == 256
        assert family.prompt(pixels) == ("\n\n<start_of_image>", (0,), "<end_of_image>\n\n")


@pytest.fixture(scope="module")
def talking(proof: Proof) -> Proof:
    """The same tower before a language model whose tokens are words, and whose layers add so much that it does not only
    repeat the last one."""
    width = proof.model.config.text_config.hidden_size
    lm = write_tiny_model(proof.lm.parent / "words.gguf", "gemma3", n_layer=6, n_embd=width, seed=1)
    for tensor in gguf.GGUFReader(lm.path, "r+").tensors:
        if ".post_" in tensor.name:
            tensor.data[:] *= 10
    return replace(proof, lm=lm.path)


@pytest.mark.parametrize("steps", ["spectrum@2:0.5", "fastv@1:0.5", "pyramid@2:0.5", "todre@3:1", "dart@2:0.5"])
def test_layer_steps_answer_alike_one_at_a_time_and_many_at_once(talking: Proof, steps: str) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "sampling": Sampling(repeat_penalty=1.5)}
    pictures = [photo(90, 60), photo(60, 100, seed=1), photo(50, 50, seed=2)]
    (step,) = read_layer_steps(steps)
    ((layer, amount),) = step.at
    share = (layer + (6 - layer) * (0 if step.name == "todre" else amount)) / 6
    with talking.open(layer_steps=steps) as vlm:
        answers = [vlm.answer(picture, "what is this", **options) for picture in pictures]
        together = list(vlm.answer_all(pictures, "what is this", **options))
        two = vlm.answer(pictures[:2], "which is larger", **options)
        assert "".join(vlm.ask(pictures[0], "what is this", stream=True, **options)) == answers[0].text
        vlm.set_layer_steps("")
        whole = [vlm.answer(picture, "what is this", **options).text for picture in pictures]
    for one, other in zip(answers, together, strict=True):
        assert isinstance(other, Answer)
        assert (one.text, one.layer_tokens) == (other.text, other.layer_tokens)
        assert (one.tokens_after, one.layer_tokens) == (TOKENS, pytest.approx(TOKENS * share))
    assert (two.tokens_after, two.layer_tokens) == (2 * TOKENS, pytest.approx(2 * TOKENS * share))
    assert len({answer.text for answer in answers}) == 3
    assert [answer.text for answer in answers] != whole


@pytest.mark.parametrize("steps", ["fastv@2:0.5", "pyramid@3:0.25", "dart@2:0.5", "todre@3:1", "spectrum@2:0.5"])
def test_with_layer_steps_the_logits_are_those_of_transformers_without_the_same_rows(proof: Proof, steps: str) -> None:
    """Transformers drops what our step left out, before the same layer."""
    pictures, question = [photo(203, 151), photo(60, 100, seed=1)], "which is larger"
    watched = Watched(*read_layer_steps(steps))
    with proof.open(layer_steps=steps) as vlm:
        encoded = vlm.encode_all(pictures)
        assert isinstance(vlm.decoder, SegmentedDecoder)
        vlm.decoder.set_steps([watched])
        _, logits = our_greedy(vlm, encoded, question, 1)
    ((layer, state, kept),) = watched.seen
    asked = proof.asked(pictures, question)
    places = np.flatnonzero(asked["input_ids"][0].numpy() == proof.model.config.image_token_id)
    assert places.tolist() == state.image.tolist()
    left = np.delete(np.arange(asked["input_ids"].shape[1]), np.delete(places, kept))
    text, seen = text_model(proof.model), {}
    with torch.no_grad():
        hook = text.layers[layer].register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
        proof.model(**asked)
        hook.remove()
        np.testing.assert_allclose(
            seen["hidden"][0, places], state.hidden, atol=5e-3 * float(np.abs(state.hidden).max())
        )
        # The layers before the cut pass on what they are given; what is left stands without gaps.
        hooks = [
            part.register_forward_hook(lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])
            for part in text.layers[:layer]
        ]
        rows = seen["hidden"][:, left]
        found = proof.model(inputs_embeds=rows, token_type_ids=asked["token_type_ids"][:, left]).logits[0, -1]
        for hook in hooks:
            hook.remove()
    assert error(logits[0], found) <= 5e-3


def test_pictures_need_a_micro_batch_each(proof: Proof) -> None:
    pictures, question = [photo(20, 30), photo(20, 20)], "what is this"
    with proof.open() as vlm:
        encoded = vlm.encode_all(pictures)
        pieces = chat_prompt(vlm.model, question, 2, proof.family.markers, proof.family.written).tokenize(vlm.model)
        rows = rows_of(prompt_parts(TokenEmbedding.of(vlm.model), pieces, encoded), 0, 0)
        for n_ubatch, fits in ((TOKENS, True), (TOKENS - 1, False)):
            with PlainDecoder(vlm.model, n_ctx=128, n_batch=64, n_ubatch=n_ubatch) as decoder:
                if fits:
                    decoder.decode(rows, causal=False)
                    continue
                with pytest.raises(TokcompError, match=r"16 image rows .* n_ubatch is 15; .* keep fewer") as fault:
                    decoder.decode(rows, causal=False)
                assert "\n" not in str(fault.value)


def test_a_picture_beyond_reason_is_refused(proof: Proof) -> None:
    with pytest.raises(TokcompError, match="picture of 70000x1 pixels"):
        proof.family.preprocess(Image.new("RGB", (70_000, 1)), proof.spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.vision.projector.scale_factor": 3}, "16 patches a side .* cannot be merged by 3"),
        ({"clip.vision.projector.scale_factor": 0}, "scale_factor 0"),
        ({"clip.vision.projector.scale_factor": "4"}, "scale_factor is '4', not an integer"),
        ({"clip.vision.patch_size": 0}, "patch_size 0"),
        ({"clip.vision.image_size": 1 << 30}, "image_size 1073741824"),
        ({"clip.vision.block_count": 99}, "after 99 blocks"),
        ({"clip.vision.attention.layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
    ],
)
def test_impossible_metadata_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    from edge_tokcomp.export.mmproj import Mmproj
    from hf_mmproj import write_mmproj_of

    path = write_mmproj_of(build("gemma3"), "gemma3", tmp_path / "m.gguf", edit=lambda keys: keys.update(changes))
    mmproj = Mmproj(path)
    with pytest.raises(TokcompError, match=message) as fault:
        family_for(mmproj.metadata).spec(mmproj.metadata, mmproj.shapes)
    assert "\n" not in str(fault.value)
