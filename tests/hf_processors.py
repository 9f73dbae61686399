"""Each family's Hugging Face processor, built offline over one small tokenizer that llama.cpp reads as well.

Pictures are resized with Pillow everywhere, as transformers does without torchvision.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.image_processing_backends import TorchvisionBackend

N_VOCAB, FIRST_SPECIAL, IMAGE, START, END = 416, 288, 300, 301, 302
# fmt: off
_SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<s>", "</s>", "<|endoftext|>", "<|startoftext|>", "<|begin_of_text|>", "<|im_start|>",
    "<|im_end|>", "<end_of_utterance>", "<video>",
    "", "", "",
    "<|video_pad|>", "[IMG_BREAK]", "[IMG_END]", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<fake_token_around_image>", "<img>", "</img>", "<start_of_image>", "<end_of_image>", "<start_of_turn>",
    "<end_of_turn>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "<image>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]",
)
"""From id 288 on. The empty ones, 300 to 302, are the family's own, which then stand nowhere else."""
_CELLS = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 10 // row + 1))
_PLAIN = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)))
"""Added tokens that are not special, so that the vocabulary has some of this type too."""
# fmt: on
# Qwen2's rule of what a word is, which llama.cpp knows as "qwen2".
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Digits stand alone by that rule. Newlines merge, as in all the families' vocabularies: where a text is cut matters.
_MERGES = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("1", "2"), ("Ċ", "Ċ"), ("ĊĊ", "Ċ")]


@dataclass(frozen=True)
class Family:
    """What transformers needs to know of a family besides its sizes.

    ``processor`` and ``pixels``: class names of its processor and its image processor. ``begins``: the tokenizer puts
    ``bos`` before a text. ``start`` and ``end``: around an image. ``names``: what its processor calls token texts.
    """

    processor: str
    pixels: str
    image: str
    bos: str
    eos: str
    begins: bool
    start: str = "<|vision_start|>"
    end: str = "<|vision_end|>"
    names: dict[str, str] = field(default_factory=dict)


_TILES = "GotOcr2ImageProcessorPil"
_INTERN = Family(
    "InternVLProcessor", _TILES, "<IMG_CONTEXT>", "<|endoftext|>", "<|im_end|>", False, "<img>", "</img>",
    {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
     "video_token": "<video>"},
)  # fmt: skip
_QWEN = ("Qwen2VLImageProcessorPil", "<|image_pad|>", "<|endoftext|>", "<|im_end|>", False)
_PIXTRAL = Family("PixtralProcessor", "PixtralImageProcessorPil", "[IMG]", "<s>", "</s>", True)
FAMILIES = {
    "llava15": Family("LlavaProcessor", "LlavaImageProcessorPil", "<image>", "<s>", "</s>", True),
    "llava_next": Family("LlavaNextProcessor", "LlavaNextImageProcessorPil", "<image>", "<s>", "</s>", True),
    "idefics3": Family(
        "Idefics3Processor", "Idefics3ImageProcessorPil", "<image>", "<|begin_of_text|>", "<end_of_utterance>", True
    ),
    "smolvlm": Family(
        "SmolVLMProcessor", "SmolVLMImageProcessorPil", "<image>", "<|im_start|>", "<end_of_utterance>", False
    ),
    "qwen2vl": Family("Qwen2VLProcessor", *_QWEN),
    "qwen25vl": Family("Qwen2_5_VLProcessor", *_QWEN),
    "qwen3vl": Family("Qwen3VLProcessor", *_QWEN),
    "internvl": _INTERN,
    "internvl_qwen2": _INTERN,
    "internvl_qwen3": _INTERN,
    "gemma3": Family(
        "Gemma3Processor", "Gemma3ImageProcessorPil", "<image_soft_token>", "<bos>", "<end_of_turn>", True,
        "<start_of_image>", "<end_of_image>", {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "lfm2vl": Family(
        "Lfm2VlProcessor", "Lfm2VlImageProcessor", "<image>", "<|startoftext|>", "<|im_end|>", True,
        "<|image_start|>", "<|image_end|>",
    ),
    "pixtral": _PIXTRAL,
    "mistral3": _PIXTRAL,
}  # fmt: skip


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 416 tokens: bytes, six merges, the special tokens of all families, fillers.

    The family's own image token has id 300, what stands before and after an image 301 and 302.
    """
    facts = FAMILIES[family]
    own = (facts.image, facts.start, facts.end)
    specials = [text for text in _SPECIALS if text and text not in own]
    specials[IMAGE - FIRST_SPECIAL : IMAGE - FIRST_SPECIAL] = own
    texts = [*bytes_to_unicode().values(), *("".join(pair) for pair in _MERGES)]
    texts += [f"<unused{number}>" for number in range(len(texts), FIRST_SPECIAL)]
    specials += _CELLS
    texts += [*specials, *_PLAIN]
    texts += [f"<unused{number}>" for number in range(len(texts), N_VOCAB)]
    backend = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, _MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    backend.add_tokens([AddedToken(text, normalized=False) for text in _PLAIN])
    if facts.begins:
        backend.post_processor = processors.TemplateProcessing(
            f"{facts.bos} $A", special_tokens=[(facts.bos, texts.index(facts.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=facts.bos, eos_token=facts.eos, pad_token="<pad>",
        extra_special_tokens={"image_token": facts.image} | facts.names,
    )  # fmt: skip


def make_processor(
    family: str, tokenizer: PreTrainedTokenizerFast, preprocessor: dict[str, Any], config: Any = None
) -> Any:
    """The family's processor with its chat template, resizing with Pillow.

    ``preprocessor``: what a checkpoint's ``preprocessor_config.json`` and ``processor_config.json`` say; each of the
    two objects takes what it knows. ``config``: the model's, from which the processor then takes all that it must agree
    on with the model.
    """
    facts = FAMILIES[family]
    processor_class = _without_video(
        _named("models.pixtral.processing_pixtral", facts.processor)
        if facts is _PIXTRAL else getattr(transformers, facts.processor)
    )  # fmt: skip
    image_class = _lfm2() if family == "lfm2vl" else getattr(transformers, facts.pixels)
    asked = set(inspect.signature(processor_class.__init__).parameters)
    known = set(image_class.valid_kwargs.__annotations__)
    if unknown := set(preprocessor) - known - asked:
        raise ValueError(f"neither {facts.processor} nor {facts.pixels} knows {', '.join(sorted(unknown))}")
    settings = {name: value for name, value in preprocessor.items() if name in asked}
    if config is not None:
        settings |= _settings(facts, config)
    parts = {
        "image_processor": image_class(**{name: value for name, value in preprocessor.items() if name in known}),
        "tokenizer": tokenizer,
    }
    if "video_processor" in asked:
        # Every video processor needs torchvision. SmolVLM's code around chat templates reads the first two.
        parts["video_processor"] = SimpleNamespace(num_frames=1, fps=1, merge_size=1, model_input_names=[])
    with _words_for_numbers():
        return processor_class(**parts, **settings, chat_template=CHAT_TEMPLATES[family])


def _settings(facts: Family, config: Any) -> dict[str, Any]:
    """What ``processor_config.json`` of a model with ``config`` says: tokens of a crop, or what they follow from."""
    vision = config.vision_config
    if facts.processor in ("LlavaProcessor", "LlavaNextProcessor"):
        return {
            "patch_size": vision.patch_size, "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }  # fmt: skip
    if facts.processor == "PixtralProcessor":
        return {"patch_size": vision.patch_size, "spatial_merge_size": getattr(config, "spatial_merge_size", 1)}
    if facts.processor in ("Idefics3Processor", "SmolVLMProcessor"):
        return {"image_seq_len": (vision.image_size // vision.patch_size // config.scale_factor) ** 2}
    if facts.processor == "InternVLProcessor":
        return {"image_seq_length": config.image_seq_length}
    if facts.processor == "Gemma3Processor":
        return {"image_seq_length": config.mm_tokens_per_image}
    return {}


@contextmanager
def _words_for_numbers() -> Iterator[None]:
    """SmolVLM insists on a package that spells the number of a video's frames, of which there are none here."""
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    with mock.patch.object(module, "num2words", module.num2words or str):
        yield


def _without_video(base: type) -> type:
    """The same processor, content with any object for its video processor."""

    def check(self: Any, name: str, value: Any) -> Any:
        return None if name == "video_processor" else base.check_argument_for_proper_class(self, name, value)

    return type(base.__name__, (base,), {"check_argument_for_proper_class": check, "__init__": base.__init__})


@lru_cache(maxsize=1)
def _lfm2() -> type:
    """LFM2-VL's image processor, which transformers has for torchvision only, over Pillow.

    The tiling, sizes and order stay transformers' own.
    """
    base = _named("models.lfm2_vl.image_processing_lfm2_vl", "Lfm2VlImageProcessor")
    return type(base.__name__, (base, _Pillow), {})


@lru_cache(maxsize=4)
def _named(module: str, name: str) -> Any:
    """A class whose file imports torchvision, of which it needs nothing here; blanks stand in where it is missing."""
    blanks = {}
    if find_spec("torchvision") is None:
        names = [f"torchvision{end}" for end in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional")]
        blanks = {name: ModuleType(name) for name in names}
        blanks[names[2]].functional = blanks[names[3]]
    sys.modules.update(blanks)
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    finally:
        for blank in blanks:
            del sys.modules[blank]


class _Pillow(TorchvisionBackend):
    """What transformers asks torchvision for, of ``(n, 3, h, w) uint8`` tensors, done with Pillow."""

    @property
    def backend(self) -> str:
        """As transformers' own Pillow processors call it."""
        return "pil"

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **_options: Any) -> torch.Tensor:
        """Each picture to ``size.height`` by ``size.width``."""
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in image]
        resized = [np.asarray(one.resize((size.width, size.height), resample)) for one in pictures]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)

    def normalize(self, image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, **_options: Any) -> torch.Tensor:
        """``(image - mean) / std`` by channel."""
        return (image - mean[:, None, None]) / std[:, None, None]


_TURNS = "{% for message in messages %}"
_ROLE = "<|im_start|>{{ message['role'] }}\n"
_PARTS = "{% for part in message['content'] %}"
_TEXT_OR = "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
_END = "{% endif %}{% endfor %}"
_ANSWER = _END + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_VISION = "<|vision_start|><|image_pad|><|vision_end|>"
_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
_IMAGES_FIRST = "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
_TEXTS = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
_MODEL_TURN = "{% else %}" + _TEXTS + "</s>{% endif %}{% endfor %}"
_QWEN2 = _TURNS + _SYSTEM + _ROLE + _PARTS + _TEXT_OR + _VISION + _ANSWER
_INTERNVL = _TURNS + _ROLE + _PARTS + _TEXT_OR + "<IMG_CONTEXT>\n" + _ANSWER
_IDEFICS = (
    _TURNS + "{{ message['role'] | capitalize }}:{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    + _PARTS + _TEXT_OR + "<image>" + _END + "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)  # fmt: skip
_MISTRAL = _TURNS + "{% if message['role'] == 'user' %}[INST]" + _PARTS + _TEXT_OR + "[IMG]" + _END + "[/INST]"
CHAT_TEMPLATES = {
    "llava15": _TURNS + "{{ message['role'] | upper }}: " + _IMAGES_FIRST + _TEXTS
    + " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "llava_next": _TURNS + "{% if message['role'] == 'user' %}[INST] " + _IMAGES_FIRST + _TEXTS + " [/INST]"
    + _MODEL_TURN,
    "idefics3": "<|begin_of_text|>" + _IDEFICS,
    "smolvlm": "<|im_start|>" + _IDEFICS,
    "qwen2vl": _QWEN2,
    "qwen25vl": _QWEN2,
    "qwen3vl": _TURNS + _ROLE + _PARTS + _TEXT_OR + _VISION + _ANSWER,
    "internvl": _INTERNVL,
    "internvl_qwen2": _INTERNVL,
    "internvl_qwen3": _INTERNVL,
    "gemma3": "{{ bos_token }}" + _TURNS
    + "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n" + _PARTS
    + "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% else %}<start_of_image>" + _END
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "lfm2vl": "{{ bos_token }}" + _TURNS + _ROLE + _PARTS + _TEXT_OR + "<image>" + _ANSWER,
    "pixtral": "{{ bos_token }}" + _MISTRAL + _MODEL_TURN,
    "mistral3": "{{ bos_token }}[SYSTEM_PROMPT]You are Mistral.[/SYSTEM_PROMPT]" + _MISTRAL + _MODEL_TURN,
}  # fmt: skip
"""What the published models' templates write for a user's images and text; short forms of them."""
