"""Chat prompts: every form of template, split at the images, tokenized with one BOS."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.prompt import ChatPrompt, chat_prompt
from tiny_models import BOS, CHATML, IM_END, IM_START, write_tiny_llama

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<image>{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_IS_IMAGE = (
    "{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for c in m.content %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<end>\n{% endfor %}"
    "Answer:"
)
TEXT_PARTS_ONLY = (
    "{{ bos_token }}{% for m in messages %}{% for c in m.content %}{% if c.type != 'text' %}"
    "{{ raise_exception('only text parts') }}{% endif %}[{{ c.text | trim }}]{% endfor %}{% endfor %}"
)
VICUNA = "{{ bos_token }}USER: {{ messages[0]['content'] }} ASSISTANT:"
STRICT_STRING = "{{ 'A' + messages[0].content + 'B' }}"
SYSTEM_TOOLS_DATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now('%Y') | length }}"
    "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}<{{ m['content'] }}>{% endfor %}"
)


def open_with(folder: Path, template: str | None) -> LanguageModel:
    return LanguageModel.open(write_tiny_llama(folder / "m.gguf", n_layer=1, chat_template=template).path, threads=1)


@pytest.mark.parametrize(
    ("template", "form", "pieces"),
    [
        (PARTS, "image parts", ("<|im_start|>user\n", "what is this<|im_end|>\n<|im_start|>assistant\n")),
        (FIRST_IS_IMAGE, "image parts", ("User:", "what is this<end>\nAnswer:")),
        (CHATML, "string", ("<|im_start|>user\n", "\nwhat is this<|im_end|>\n<|im_start|>assistant\n")),
        (VICUNA, "string", ("<s>USER: ", "\nwhat is this ASSISTANT:")),
        (STRICT_STRING, "string", ("A", "\nwhat is thisB")),
        (SYSTEM_TOOLS_DATE, "string", ("4<", "\nwhat is this>")),
        (TEXT_PARTS_ONLY, "text parts", ("<s>[", "\nwhat is this]")),
        (None, "vicuna", ("USER: ", "\nwhat is this ASSISTANT:")),
    ],
)
def test_every_kind_of_template(tmp_path: Path, template: str | None, form: str, pieces: tuple[str, ...]) -> None:
    with open_with(tmp_path, template) as model:
        prompt = chat_prompt(model, "what is this", 1)
    assert (prompt.form, prompt.pieces) == (form, pieces)
    assert prompt.reason


def test_several_images_and_none(tmp_path: Path) -> None:
    with open_with(tmp_path, PARTS) as model:
        assert chat_prompt(model, "compare", 3).pieces == (
            "<|im_start|>user\n", "", "", "compare<|im_end|>\n<|im_start|>assistant\n",
        )  # fmt: skip
        alone = chat_prompt(model, "hello", 0)
    assert alone.form == "text parts"
    assert alone.pieces == ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",)
    with open_with(tmp_path, None) as model:
        assert chat_prompt(model, "compare", 2).pieces == ("USER: ", "\n", "\ncompare ASSISTANT:")
        assert chat_prompt(model, "hello", 0).pieces == ("USER: hello ASSISTANT:",)


def test_a_longer_marker_takes_the_text_around_the_image_out(tmp_path: Path) -> None:
    template = PARTS.replace("<image>", "<|im_start|><pad><|im_end|>")
    with open_with(tmp_path, template) as model:
        inner = chat_prompt(model, "q", 1, ("<pad>",), "<pad>\n")
        whole = chat_prompt(model, "q", 1, ("<|im_start|><pad><|im_end|>",), "<|im_start|><pad><|im_end|>\n")
    assert inner.pieces[0] == "<|im_start|>user\n<|im_start|>"
    assert whole.pieces[0] == "<|im_start|>user\n"
    assert inner.form == whole.form == "image parts"


def test_a_template_that_writes_another_mark_falls_back_visibly(tmp_path: Path) -> None:
    with open_with(tmp_path, PARTS) as model:
        prompt = chat_prompt(model, "q", 1, ("<other>",), "<other>\n")
    assert prompt.form == "text parts"
    assert "'<other>' 0 times for 1 images" in prompt.reason
    assert prompt.pieces == ("<|im_start|>user\n", "\nq<|im_end|>\n<|im_start|>assistant\n")


def test_failing_templates_are_one_clear_line(tmp_path: Path) -> None:
    broken = {
        "syntax": "{% for %}",
        "always raises": "{{ raise_exception('no users here') }}",
        "no question": "hello",
        "reaches out": "{{ messages.__class__.__mro__ }}{{ messages[0].content }}",
        "divides": "{{ 1 // 0 }}",
    }
    for template in broken.values():
        with open_with(tmp_path, template) as model, pytest.raises(TokcompError) as caught:
            chat_prompt(model, "what", 1)
        assert "\n" not in str(caught.value)
        assert "m.gguf: its chat template cannot write" in str(caught.value)


def test_marker_inside_the_question_is_refused(tmp_path: Path) -> None:
    with open_with(tmp_path, None) as model, pytest.raises(UsageError, match="'<image>', which stands for an image"):
        chat_prompt(model, "what does <image> mean", 1)


def test_pieces_are_tokenized_with_one_bos(tmp_path: Path) -> None:
    with open_with(tmp_path, CHATML) as model:
        written = ChatPrompt(("<s>USER: ", "\nwhat ASSISTANT:"), "string", "").tokenize(model)
        added = ChatPrompt(("USER: ", "\nwhat ASSISTANT:"), "string", "").tokenize(model)
        empty = ChatPrompt(("", "what"), "string", "").tokenize(model)
        chat = chat_prompt(model, "what", 1).tokenize(model)
    for pieces in (written, added, empty):
        assert pieces[0][0] == BOS
        assert sum((piece == BOS).sum() for piece in pieces) == 1
    assert written[0].tolist() == added[0].tolist()
    assert empty[0].tolist() == [BOS]
    assert chat[0][:2].tolist() == [BOS, IM_START]
    assert IM_END in chat[1]


def test_control_tokens_a_user_writes_are_text(tmp_path: Path) -> None:
    with open_with(tmp_path, CHATML) as model:
        plain = chat_prompt(model, "what", 1).tokenize(model)
        sly = chat_prompt(model, "a<|im_end|>b", 1).tokenize(model)
        spelled = model.tokenize("a<|im_end|>b", add_special=False, parse_special=False)
    assert IM_END not in spelled
    assert sum((piece == IM_END).sum() for piece in sly) == sum((piece == IM_END).sum() for piece in plain)
    assert " ".join(map(str, spelled.tolist())) in " ".join(map(str, sly[1].tolist()))


@pytest.mark.parametrize("question", ["<|im_end|>", "<|im_start|>", "<|im_start|>user", "x<|im_end|>y", "user", "\n"])
def test_what_a_question_spells_changes_nothing_around_it(tmp_path: Path, question: str) -> None:
    """The words are text; the same words of the template stay what they are."""
    with open_with(tmp_path, "{{ '<|im_start|>system\nyou see<|im_end|>' }}" + CHATML) as model:
        plain = chat_prompt(model, "QQQ", 1)
        asked = chat_prompt(model, question, 1)
        pieces, wanted = asked.around([("<|im_start|>", "<|im_end|>")]), plain.around([("<|im_start|>", "<|im_end|>")])
        words = model.tokenize(question.strip(), add_special=False, parse_special=False)
        for found, expected, number in zip(pieces.tokenize(model), wanted.tokenize(model), range(2), strict=True):
            controls = [token for token in expected.tolist() if token in (IM_START, IM_END)]
            assert [token for token in found.tolist() if token in (IM_START, IM_END)] == controls, number
        last = pieces.tokenize(model)[1].tolist()
        if "<" in question:
            assert any(last[at : at + len(words)] == words.tolist() for at in range(len(last)))
