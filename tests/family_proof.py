"""One model of a family three ways: in transformers, as the two GGUF files, and in our pipeline over these files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edge_tokcomp import VLM, load
from edge_tokcomp.export.tower_files import cached_tower
from edge_tokcomp.families import Family, TowerSpec, family_named
from edge_tokcomp.tower import Tower
from hf_language import round_gelu, text_model, write_language
from hf_mmproj import write_mmproj_of
from hf_processors import CHAT_TEMPLATES, make_processor, make_tokenizer
from hf_vlms import FAMILIES, build

Floats = NDArray[np.float32]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth coloured noise with an edge: resampling shows, and patches differ."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (max(height // 6, 2), max(width // 6, 2), 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).copy()
    picture[height // 3 :, width // 2 :] //= 2
    return Image.fromarray(picture)


@dataclass
class Proof:
    """``name``: in ``hf_vlms``. ``model``, ``processor``: transformers'. ``lm``, ``mmproj``: files of the same."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    lm: Path
    mmproj: Path

    @classmethod
    def make(cls, name: str, folder: Path, edit: Callable[[dict[str, Any]], None] = lambda metadata: None) -> Proof:
        """``edit``: of the mmproj's metadata."""
        model = build(name)
        # Internvl comes with two language models, but has one processor.
        family = name.partition("_")[0] if name.startswith("internvl") else name
        tokenizer = make_tokenizer(family)
        processor = make_processor(family, tokenizer, FAMILIES[name].preprocessor, model.config)
        lm = write_language(model, family, folder / "lm.gguf", tokenizer, CHAT_TEMPLATES[family])
        mmproj = write_mmproj_of(model, name, folder / "mmproj.gguf", edit=edit)
        round_gelu(model)
        return cls(name, model, processor, tokenizer, lm, mmproj)

    @property
    def spec(self) -> TowerSpec:
        return cached_tower(self.mmproj, threads=1).spec

    @property
    def family(self) -> Family:
        return family_named(self.spec.family)

    def tower(self) -> Tower:
        return Tower(cached_tower(self.mmproj, threads=1).directory, provider="cpu", threads=1)

    def open(self, **options: Any) -> VLM:
        """Our pipeline over the two files."""
        return load(self.lm, self.mmproj, threads=1, provider="cpu", n_ctx=2048, **options)

    def asked(self, images: list[Image.Image], question: str) -> dict[str, Any]:
        """What the processor makes of a turn of images and a question."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        text = text.removeprefix(self.tokenizer.bos_token) if self.adds_bos else text
        return dict(self.processor(images=images, text=text, return_tensors="pt"))

    @property
    def adds_bos(self) -> bool:
        """Whether the processor puts BOS before a text; LFM2-VL's leaves that to the template."""
        special = getattr(self.processor, "text_kwargs", {}).get("add_special_tokens", True)
        first = self.tokenizer("a", add_special_tokens=special)["input_ids"][0]
        return bool(first == self.tokenizer.bos_token_id)

    def greedy(self, images: list[Image.Image], question: str, tokens: int) -> tuple[list[int], Floats]:
        """``tokens`` greedy tokens by transformers, and the logits before each of them."""
        with torch.no_grad():
            out = self.model.generate(
                **self.asked(images, question), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out.sequences[0, -tokens:].tolist(), torch.cat(out.logits).float().numpy()


def error(found: Any, wanted: Any) -> float:
    """Relative, ``|found - wanted| / |wanted|``."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise AssertionError(f"{found.shape} is not {wanted.shape}")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def our_greedy(vlm: VLM, images: list[Any], question: str, tokens: int) -> tuple[list[int], Floats]:
    """``tokens`` greedy tokens by our pipeline, and the logits before each of them."""
    prompt, _, _ = vlm.asker._prompt(vlm.encode_all(images, question), question)
    said: list[int] = []
    seen: list[Floats] = []
    rows = list(prompt)
    while len(said) < tokens:
        batch = [*rows[:-1], replace(rows[-1], want_logits=None)]
        logits = vlm.decoder.decode(batch, causal=vlm.engine.causal)[-1][-1]
        seen.append(logits.copy())
        said.append(int(logits.argmax()))
        rows = [vlm.embedding.rows([said[-1]], vlm.decoder.length(1), 1)]
    vlm.decoder.drop(1)
    return said, np.stack(seen)


def assert_same_text(proof: Proof, images: list[Image.Image], question: str = "what is this", tokens: int = 8) -> None:
    """Our greedy tokens are transformers', and our logits theirs but for rounding."""
    with proof.open() as vlm:
        said, logits = our_greedy(vlm, images, question, tokens)
    theirs, wanted = proof.greedy(images, question, tokens)
    assert error(logits[0], wanted[0]) <= 5e-3
    assert said == theirs
    assert error(logits, wanted) <= 5e-3


def assert_same_rows(proof: Proof, image: Image.Image, wanted: Any) -> None:
    """Rows at language width, separators left out, are ``wanted (N, d)``, transformers' of the same picture."""
    with proof.open() as vlm:
        tokens = vlm.see(image).tokens
    assert error(tokens.embeddings[tokens.layout.patches], wanted) <= 1e-4


def assert_same_when_rows_are_dropped(
    proof: Proof, image: Image.Image, question: str = "what is this", method: str = "divprune", keep: float = 0.5
) -> None:
    """With half of the rows our logits are those of transformers without the same rows.

    Rows stand one after another, or for M-RoPE where they stood.
    """
    with proof.open(method=method, keep=keep) as vlm:
        encoded = vlm.encode(image, question)
        _, logits = our_greedy(vlm, [encoded], question, 1)
    plan, layout = encoded.plan, encoded.tokens.layout
    assert len(plan) < plan.before
    assert plan.assign is None
    asked = proof.asked([image], question)
    heard: list[dict[str, Any]] = []
    stack = text_model(proof.model)
    hook = stack.register_forward_pre_hook(lambda _module, _args, kwargs: heard.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        proof.model(**asked)
    hook.remove()
    places = np.flatnonzero(asked["input_ids"][0].numpy() == proof.model.config.image_token_id)
    ours = layout.patches if len(places) == len(layout.patches) else layout.uncompressed
    assert len(places) == len(ours)
    stay = np.ones(asked["input_ids"].shape[1], np.bool_)
    stay[places] = np.isin(ours, plan.keep)
    left = torch.from_numpy(np.flatnonzero(stay))
    (call,) = heard
    with torch.no_grad():
        states = stack(**{name: _left(name, value, left, proof, stay[places]) for name, value in call.items()})[0]
        wanted = proof.model.lm_head(states[0, -1])
    assert error(logits[0], wanted) <= 5e-3


def _left(name: str, value: Any, left: torch.Tensor, proof: Proof, kept: NDArray[np.bool_]) -> Any:
    """One argument of the text model for the rows ``left``; ``kept`` of its image rows."""
    if name == "inputs_embeds":
        return value[:, left]
    if name == "visual_pos_masks":
        return value[:, left]
    if name == "deepstack_visual_embeds":
        return [level[torch.from_numpy(kept)] for level in value]
    if name == "position_ids" and value is not None:
        return value[..., left] if proof.family.positions == "grid" else torch.arange(len(left))[None]
    if isinstance(value, dict):  # masks by kind of layer
        return {kind: _left("mask", mask, left, proof, kept) for kind, mask in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim == 4:
        return value[:, :, left][..., left]
    if isinstance(value, torch.Tensor) and name == "attention_mask":
        return value[:, left]
    return None if name in ("past_key_values", "input_ids", "cache_position") else value
