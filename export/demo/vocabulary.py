"""The demo model's tokenizer: SentencePiece BPE with byte fallback, so that any text encodes and decodes.

Trained on the demo's own sentences and on the English of scikit-learn's bundled data-set descriptions, so that words
outside the demo break into pieces larger than letters.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .questions import ask_all
from .scenes import draw_scene

SIZE = 1024
BOS, EOS, UNKNOWN = 1, 2, 0
BEFORE_IMAGE = "USER: "
AFTER_IMAGE = "\n{question} ASSISTANT:"
"""LLaVA-1.5's form. Pieces are tokenised one by one, BOS before the first; the answer is ' ' + text + EOS."""

ALGORITHM, NORMALIZATION = "bpe", "identity"
TRAINER: dict[str, Any] = {
    "vocab_size": SIZE, "byte_fallback": True, "character_coverage": 0.9999, "split_digits": True, "unk_id": UNKNOWN,
    "bos_id": BOS, "eos_id": EOS, "pad_id": -1, "num_threads": 1,
}  # fmt: skip
NORMALIZER: dict[str, Any] = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
"""SentencePiece's settings, by their names in a model's ``trainer_spec`` and ``normalizer_spec``."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }} {% endif %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endif %}"
    "{% if message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def train_vocabulary(path: Path, scenes: int = 3000) -> None:
    """Write a SentencePiece model of ``SIZE`` pieces, trained on questions about ``scenes`` scenes, to ``path``."""
    import sentencepiece
    from sklearn import datasets

    rng = np.random.default_rng(7)
    lines = []
    for seed in range(scenes):
        for question in ask_all(draw_scene((7, seed)), rng):
            lines.append(BEFORE_IMAGE)
            lines.append(AFTER_IMAGE.format(question=question.text).strip() + f" {question.answer}")
    for load in (datasets.load_digits, datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer,
                 datasets.load_diabetes, datasets.load_linnerud):  # fmt: skip
        lines += [line for line in load().DESCR.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=ALGORITHM,
        normalization_rule_name=NORMALIZATION, **TRAINER, **NORMALIZER, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def write_pieces(path: Path, pieces: Iterable[tuple[str, float, int]]) -> None:
    """Write ``(piece, score, type)`` triples as a SentencePiece model with the settings of ``train_vocabulary``."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, normalizer.name = trainer.ModelType.Value(ALGORITHM.upper()), NORMALIZATION
    for spec, settings in ((trainer, TRAINER), (normalizer, NORMALIZER)):
        for name, value in settings.items():
            setattr(spec, name, value)
    path.write_bytes(model.SerializeToString())


class Vocabulary:
    """Encodes and decodes with a trained SentencePiece model."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone: no BOS, no EOS."""
        return list(self.processor.encode(text))

    def decode(self, tokens: list[int]) -> str:
        """Text of ``tokens``."""
        return str(self.processor.decode(tokens))
