"""The GGUFs written from transformers' models compute what transformers does, from the tokens it makes of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image

import hf_vlms
from decoding import Floats, exact, image_prompt, random_rows, wanting_all
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.prompt import chat_prompt
from edge_tokcomp.language.token_embedding import TokenEmbedding
from edge_tokcomp.tokens import Rows
from hf_language import round_gelu, text_model, write_language
from hf_processors import CHAT_TEMPLATES, END, FAMILIES, IMAGE, START, make_processor, make_tokenizer

ARCHITECTURES = {
    "llava15": "llama", "llava_next": "llama", "idefics3": "llama", "smolvlm": "llama", "qwen2vl": "qwen2vl",
    "qwen25vl": "qwen2vl", "qwen3vl": "qwen3vl", "internvl_qwen2": "qwen2", "internvl_qwen3": "qwen3",
    "gemma3": "gemma3", "lfm2vl": "lfm2", "pixtral": "llama", "mistral3": "mistral3",
}  # fmt: skip
TOLERANCE = 1e-4
PROMPTS = (
    "Describe the image.", "  Été à Zürich,\n\n  naïve — 你好 🦙!\n", "the other's 1234 tenths\t<b>the</b>", "", "\n",
    "<unused7><|im_start|>user\n{image}the<end_of_utterance>\nAssistant: <unused400>",
    "{image}{image} {start}{image}{end}\r\n [INST]<row_1_col_2><row_4_col_5><|img_row_10_col_1|>[/INST] <global-img>",
    "<s>a</s> <bos><start_of_turn>model\n<|vision_start|>…<|vision_end|><fake_token_around_image>< image >",
)  # fmt: skip


def written(model: Any, family: str, folder: Path, **options: Any) -> LanguageModel:
    path = write_language(
        model, family, folder / f"{family}.gguf", make_tokenizer(family), CHAT_TEMPLATES[family], **options
    )
    return LanguageModel.open(path, threads=1)


def logits_of(model: Any, rows: Floats, **inputs: Any) -> Floats:
    """transformers' logits ``(n, n_vocab)`` for rows that go into the text model as they are."""
    embeddings = torch.from_numpy(rows)[None]
    with torch.no_grad():
        hidden = text_model(model)(inputs_embeds=embeddings, use_cache=False, **inputs).last_hidden_state
        return np.asarray(model.lm_head(hidden)[0])


def error(got: Floats, want: Floats) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.fixture(params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Any:
    model = hf_vlms.build(family, seed=1)
    round_gelu(model)
    return model


@pytest.fixture
def language(model: Any, family: str, tmp_path: Path) -> Iterator[LanguageModel]:
    with written(model, family, tmp_path) as language:
        yield language


def test_logits_and_greedy_tokens_are_those_of_transformers(model: Any, language: LanguageModel, family: str) -> None:
    tokens = np.random.default_rng(2).integers(0, 416, 20)
    table = TokenEmbedding.of(language)
    assert language.architecture == ARCHITECTURES[family]
    with exact(language) as decoder:
        (got,) = decoder.decode([wanting_all(table.rows(tokens, 0))])
        said = [int(got[-1].argmax())]
        while len(said) < 8:
            (step,) = decoder.decode([table.rows([said[-1]], len(tokens) + len(said) - 1)])
            said.append(int(step[-1].argmax()))
    with torch.no_grad():
        whole = np.asarray(model(input_ids=torch.from_numpy(np.concatenate([tokens, said[:-1]]))[None]).logits[0])
    assert error(got, whole[:20]) < TOLERANCE
    assert said == whole[19:].argmax(axis=1).tolist()
    assert len(np.unique(whole.argmax(axis=1))) > 4, "a model that always says the same shows nothing"


@pytest.mark.parametrize("family", ["qwen2vl", "qwen25vl", "qwen3vl"])
def test_rows_at_grid_positions_give_transformers_logits(model: Any, language: LanguageModel) -> None:
    rows, positions = image_prompt()
    wide = np.zeros((len(rows), language.n_embd_inp), np.float32)
    wide[:, : language.n_embd] = rows
    image = positions[0] == 3
    deep: dict[str, Any] = {}
    if language.n_embd_inp > language.n_embd:  # deepstack: three slices more
        levels = random_rows(int(image.sum()), seed=9, width=3 * language.n_embd).embeddings
        wide[image, language.n_embd :] = levels
        deep = {
            "visual_pos_masks": torch.from_numpy(image)[None],
            "deepstack_visual_embeds": list(torch.from_numpy(levels).split(language.n_embd, dim=1)),
        }
    with exact(language) as decoder:
        (got,) = decoder.decode([wanting_all(Rows(wide, positions))])
    want = logits_of(model, rows, position_ids=torch.from_numpy(positions[:3].astype(np.int64))[:, None], **deep)
    assert error(got, want) < TOLERANCE


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_non_causal_block_gives_the_logits_of_transformers_image_mask(model: Any, language: LanguageModel) -> None:
    # As long as token rows are: in short ones the table of round_gelu makes 5e-4 of a change of 3e-7.
    parts = [
        Rows(8 * rows.embeddings, rows.positions)
        for rows in (random_rows(40, 0, seed=1), random_rows(16, 40, seed=2), random_rows(10, 56, seed=3))
    ]
    parts[1] = replace(parts[1], crop=np.zeros(16, np.int64))
    with exact(language) as decoder:
        got = decoder.decode([wanting_all(part) for part in parts], causal=False)
    kinds = torch.zeros(1, 66, dtype=torch.int64)
    kinds[:, 40:56] = 1
    with torch.no_grad():
        rows = torch.from_numpy(np.concatenate([part.embeddings for part in parts]))[None]
        want, causal = (
            np.asarray(model(inputs_embeds=rows, token_type_ids=kind).logits[0]) for kind in (kinds, 0 * kinds)
        )
    assert error(np.concatenate(got), want) < TOLERANCE
    assert error(causal, want) > 100 * TOLERANCE


def changed(family: str, **settings: Any) -> Any:
    """The family's model with other settings of its text model and the same weights."""
    entry = hf_vlms.FAMILIES[family]
    config = entry.config(hf_vlms.Ids())
    for name, value in settings.items():
        setattr(config.text_config, name, value)
    model = entry.model(config).float().eval()
    model.load_state_dict(hf_vlms.build(family, seed=1).state_dict())
    round_gelu(model)
    return model


def test_gemma3_has_the_layers_windows_and_bases_of_its_config(tmp_path: Path) -> None:
    local, whole = "sliding_attention", "full_attention"
    rope = {whole: {"rope_type": "default", "rope_theta": 3e5}, local: {"rope_type": "default", "rope_theta": 5e2}}
    model = changed("gemma3", layer_types=[local, local, whole] * 2, sliding_window=8, rope_parameters=rope)
    rows = Rows(8 * random_rows(40).embeddings, random_rows(40).positions)
    with written(model, "gemma3", tmp_path) as language, exact(language) as decoder:
        (got,) = decoder.decode([wanting_all(rows)])
    assert error(got, logits_of(model, rows.embeddings)) < TOLERANCE


def test_scaled_rotations_are_written(tmp_path: Path) -> None:
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rows = random_rows(40)
    seen = []
    for rope in (
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, **llama3},
    ):
        model = changed("llava15", rope_parameters={"rope_theta": 1e4, **rope})
        with written(model, "llava15", tmp_path) as language, exact(language) as decoder:
            (got,) = decoder.decode([wanting_all(rows)])
        seen.append(logits_of(model, rows.embeddings))
        assert error(got, seen[-1]) < TOLERANCE
    assert min(error(seen[0], other) for other in seen[1:]) > 100 * TOLERANCE


def test_matrices_take_the_type_asked_for(tmp_path: Path) -> None:
    model = hf_vlms.build("smolvlm")
    kinds = {}
    for kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0):
        with written(model, "smolvlm", tmp_path, kind=kind) as language, exact(language) as decoder:
            (got,) = decoder.decode([wanting_all(random_rows(20))])
            kinds[kind.name] = {tensor.type_name for tensor in language.header.tensors.values()}
        assert error(got, logits_of(model, random_rows(20).embeddings)) < (0.01 if kind.name == "F16" else 0.1)
    assert kinds == {"F16": {"F32", "F16"}, "Q8_0": {"F32", "Q8_0"}}


@pytest.mark.parametrize(
    ("family", "setting", "value", "fault"),
    [
        ("gemma3", "query_pre_attn_scalar", 48, "scales gemma3's attention by head_dim 32, not 48"),
        ("llava15", "hidden_act", "gelu", "computes silu, not gelu"),
        ("internvl_qwen2", "layer_types", ["full_attention", "sliding_attention"], "no sliding window for qwen2"),
        ("llava15", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, "'yarn' of llama"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(tmp_path: Path, family: str, setting: str, value: Any, fault: str) -> None:
    model = hf_vlms.build(family)
    setattr(model.config.text_config, setting, value)
    with pytest.raises(ValueError, match=fault):
        written(model, family, tmp_path)


def test_llama_cpp_makes_the_tokens_that_transformers_makes(language: LanguageModel, family: str) -> None:
    tokenizer, facts = make_tokenizer(family), FAMILIES[family]
    own = {"image": facts.image, "start": facts.start, "end": facts.end}
    assert tokenizer.convert_tokens_to_ids(list(own.values())) == [IMAGE, START, END]
    assert (len(tokenizer), language.n_vocab, language.eos_text) == (416, 416, facts.eos)
    for prompt in PROMPTS:
        text = prompt.format(**own)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert language.tokenize(text, add_special=False, parse_special=True).tolist() == ids
        assert language.tokenize(text, add_special=True, parse_special=True).tolist() == tokenizer(text)["input_ids"]
        assert language.detokenize(np.array(ids, np.int32), special=True) == tokenizer.decode(ids) == text
        plain = language.detokenize(np.array(ids, np.int32))
        assert plain == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_chat_template_writes_the_same_for_both(language: LanguageModel, family: str) -> None:
    marker = "<start_of_image>" if family == "gemma3" else FAMILIES[family].image
    prompt = chat_prompt(language, "What is été?", 2, (marker,), marker)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is été?"}]
    processor = make_processor(family, make_tokenizer(family), {})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt.form == "image parts"
    assert marker.join(prompt.pieces) == text == TURNS[family]


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (100, 150, 3), np.uint8))


def test_a_processor_makes_room_for_the_rows_of_a_picture(model: Any, family: str, picture: Image.Image) -> None:
    processor = make_processor(family, make_tokenizer(family), hf_vlms.FAMILIES[family].preprocessor, model.config)
    assert processor.image_processor.backend == "pil"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is été?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    ids = inputs["input_ids"][0].tolist()
    begins = make_tokenizer(family).bos_token_id if FAMILIES[family].begins else -1
    assert (ids.count(IMAGE), ids.count(begins)) == (COUNTS[family], int(FAMILIES[family].begins))
    with torch.no_grad():  # where the count is wrong, transformers raises
        assert model(**inputs).logits.isfinite().all()


def test_lfm2vl_cuts_what_pillow_resized_into_tiles_by_rows() -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (960, 1280, 3), np.uint8))
    tokenizer = make_tokenizer("lfm2vl")
    processor = make_processor("lfm2vl", tokenizer, hf_vlms.FAMILIES["lfm2vl"].preprocessor)
    inputs = processor(images=picture, text="<image>", return_tensors="pt")
    resized = picture.resize((3 * 512, 2 * 512), Image.Resampling.BILINEAR)
    thumbnail = picture.resize((18 * 32, 13 * 32), Image.Resampling.BILINEAR)
    crops = [resized.crop((x, y, x + 512, y + 512)) for y in (0, 512) for x in (0, 512, 1024)] + [thumbnail]
    for got, crop in zip(inputs["pixel_values"].numpy(), crops, strict=True):
        pixels = (np.asarray(crop, np.float32) / 255 - 0.5) / 0.5
        rows, columns = crop.height // 16, crop.width // 16
        patches = pixels.reshape(rows, 16, columns, 16, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        np.testing.assert_allclose(got[: rows * columns], patches, atol=1e-6)
    marks = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2, 3)]
    tiles = "".join(mark + 256 * "<image>" for mark in marks)
    text = f"<|image_start|>{tiles}<|img_thumbnail|>{13 * 18 * '<image>'}<|image_end|>"
    assert inputs["input_ids"][0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_setting_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="neither LlavaProcessor nor LlavaImageProcessorPil knows tile_size"):
        make_processor("llava15", make_tokenizer("llava15"), {"tile_size": 512})


# What the published templates write for two images and a question.
TURNS = {
    "llava15": "USER: <image>\n<image>\nWhat is été? ASSISTANT:",
    "llava_next": "[INST] <image>\n<image>\nWhat is été? [/INST]",
    "idefics3": "<|begin_of_text|>User:<image><image>What is été?<end_of_utterance>\nAssistant:",
    "smolvlm": "<|im_start|>User:<image><image>What is été?<end_of_utterance>\nAssistant:",
    "qwen2vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    + 2 * "<|vision_start|><|image_pad|><|vision_end|>" + "What is été?<|im_end|>\n<|im_start|>assistant\n",
    "qwen3vl": "<|im_start|>user\n" + 2 * "<|vision_start|><|image_pad|><|vision_end|>"
    + "What is été?<|im_end|>\n<|im_start|>assistant\n",
    "internvl_qwen2": "<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhat is été?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma3": "<bos><start_of_turn>user\n<start_of_image><start_of_image>What is été?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "lfm2vl": "<|startoftext|><|im_start|>user\n<image><image>What is été?<|im_end|>\n<|im_start|>assistant\n",
    "pixtral": "<s>[INST][IMG][IMG]What is été?[/INST]",
    "mistral3": "<s>[SYSTEM_PROMPT]You are Mistral.[/SYSTEM_PROMPT][INST][IMG][IMG]What is été?[/INST]",
}  # fmt: skip
TURNS |= {"qwen25vl": TURNS["qwen2vl"], "internvl_qwen3": TURNS["internvl_qwen2"]}
# Of a picture 150 wide and 100 high: tokens of a crop, crops, rows of newlines.
COUNTS = {
    "llava15": 6 * 6,  # one square crop of 48 pixels, patches of 8
    "llava_next": 6 * 6 + 8 * 12 + 8,  # overview; 96 x 96 without the padding of 2 rows above and below; newlines
    "idefics3": 16 * (3 * 4 + 1),  # 128 x 96 in tiles of 32, and the overview
    "smolvlm": 16 * (3 * 4 + 1),  # 256 x 192 in tiles of 64, and the overview
    "qwen2vl": 6 * 9,  # 96 x 144 in units of 16
    "qwen25vl": 4 * 5,  # 112 x 140 in units of 28
    "qwen3vl": 6 * 9,
    "internvl_qwen2": 16 * (2 * 3 + 1),  # the grid nearest to 3 : 2, and the overview
    "internvl_qwen3": 16 * (2 * 3 + 1),
    "gemma3": 16,
    "lfm2vl": 7 * 10,  # enlarged to at least 64 tokens of 32 pixels
    "pixtral": 11 * 16,  # 128 wide, patches of 8
    "mistral3": 6 * 8,  # the same, merged two by two
}
