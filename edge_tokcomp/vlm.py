"""The pipeline: picture -> tokens -> plan -> rows -> text. Nothing else assembles it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from threadpoolctl import ThreadpoolController

from .answers import Answer, AnswerStream, EncodedImage
from .budget import parse_keep, tokens_to_keep
from .errors import TokcompError, UsageError
from .families import family_named
from .families.base import Pixels
from .images import MAX_PIXELS, Image, open_image, wrap_image
from .language.decoder import PlainDecoder, available_cores
from .language.generation import Generation, generate
from .language.model import LanguageModel
from .language.prompt import chat_prompt
from .language.sampling import Sampling
from .language.token_embedding import TokenEmbedding
from .methods import Method, get_method
from .tokens import Rows, VisionTokens
from .tower import Provider, Tower

DEFAULT_METHOD = "prunesid"
CAPTION_PROMPT = "Describe the image."

Picture = Any
"""A path, encoded bytes, a PIL image, an ``(H, W, 3) uint8`` array, an ``images.Image`` or an ``EncodedImage``."""

_IMAGE_STAGES = ("decode", "preprocess", "encode", "compress")

_THREADS_A_CORE = 4
"""More threads than that only wait for each other, in thousands for ever."""

_PREFIX, _ANSWER = 0, 1
"""Sequences: the prompt up to and including the last image, which is kept for the next question; the answer."""


def load(
    lm: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    *,
    method: str | Method | None = None,
    keep: str | int | float | None = None,
    precision: Literal["fp32", "int8"] = "fp32",
    provider: Provider = "auto",
    gpu_layers: int = 0,
    threads: int | None = None,
    n_ctx: int | None = None,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> VLM:
    """Open a vision-language model: ``lm`` and ``mmproj`` GGUF files, or the bundled demo model when neither is named.

    ``keep``: image tokens kept, an int or a fraction; nothing is compressed unless it is given. ``method``: a name
    (``edge-tokcomp methods``) or a ``Method``; ``prunesid`` when only ``keep`` is given. ``threads``: one budget for
    ONNX Runtime, BLAS and llama.cpp; all cores by default. ``n_ctx``: rows of context; by default the model's own up
    to 4096. The first load of an mmproj builds its ONNX tower, in a cache.

    Raises ``TokcompError`` for files that are missing, damaged or do not fit each other, ``UsageError`` for options.
    """
    for name, value in (("threads", threads), ("n_ctx", n_ctx)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} is not a positive number; leave it out for the default")
    cores = available_cores()
    if threads is not None and threads > _THREADS_A_CORE * cores:
        raise UsageError(f"threads {threads} is more than {_THREADS_A_CORE} for each of {cores} cores; ask for {cores}")
    if (lm is None) != (mmproj is None):
        missing = "mmproj" if mmproj is None else "lm"
        raise UsageError(f"lm and mmproj come together, but {missing} is not given; name neither for the demo model")
    if lm is None or mmproj is None:
        from .models import DEMO_LM, DEMO_MMPROJ

        lm, mmproj = DEMO_LM, DEMO_MMPROJ
    if method is None:
        method = "none" if keep is None else DEFAULT_METHOD
    chosen = get_method(method)
    if keep is None and chosen.compresses:
        raise UsageError(f"method {chosen.name} needs keep: how many image tokens to keep (64, 0.25, 25%)")
    budget = 1.0 if keep is None else parse_keep(keep)
    Sampling(seed=seed)  # refuses a seed out of range before the files are read
    return VLM(
        Path(lm), Path(mmproj), chosen, budget if chosen.compresses else 1.0,
        precision=precision, provider=provider, gpu_layers=gpu_layers, threads=threads or cores,
        n_ctx=n_ctx, seed=seed, max_pixels=max_pixels,
    )  # fmt: skip


class VLM:
    """A loaded model. Use as a context manager, or ``close``. Not for several threads at once."""

    def __init__(
        self, lm: Path, mmproj: Path, method: Method, keep: int | float, *, precision: Literal["fp32", "int8"],
        provider: Provider, gpu_layers: int, threads: int, n_ctx: int | None, seed: int, max_pixels: int,
    ) -> None:  # fmt: skip
        from .export.tower_files import cached_tower

        self.lm, self.mmproj, self.method, self.keep = lm, mmproj, method, keep
        self.precision, self.seed, self.max_pixels = precision, seed, max_pixels
        with ExitStack() as stack:
            self.model = stack.enter_context(LanguageModel.open(lm, gpu_layers=gpu_layers, threads=threads))
            files = cached_tower(mmproj, precision, threads=threads)
            self.spec, self.family = files.spec, family_named(files.spec.family)
            self.tower = Tower(files.directory, provider=provider, threads=threads)
            if self.tower.language_width != self.model.n_embd_inp:
                raise TokcompError(
                    f"{mmproj} writes rows of {self.tower.language_width}, {lm} takes {self.model.n_embd_inp}; "
                    "the two files are not of one model"
                )
            self.embedding = TokenEmbedding.of(self.model)
            self.decoder = stack.enter_context(
                PlainDecoder(self.model, n_ctx=n_ctx or min(self.model.n_ctx_train, 4096), n_sequences=2)
            )
            self._pools = ThreadpoolController()
            self.threads = threads
            self._held: tuple[object, ...] | None = None
            self._closed = False
            self._timed: WeakSet[EncodedImage] = WeakSet()
            self._streaming: AnswerStream | None = None
            self._stack = stack.pop_all()

    def encode(self, picture: Picture, question: str = CAPTION_PROMPT) -> EncodedImage:
        """Decode, preprocess, run the tower, choose what to keep, project it.

        ``question``: what will be asked, for methods that keep what matters to it.
        Raises ``ImageError`` for a picture that cannot be read.
        """
        if isinstance(picture, EncodedImage):
            if picture.question in (None, question):
                return picture
            return self.compress(picture, picture.method, picture.keep, question)
        clock = _Clock()
        image = self._open(picture)
        clock.stop("decode")
        pixels = self.family.preprocess(image.picture, self.spec)
        clock.stop("preprocess")
        tokens = self._tokens(pixels)
        clock.stop("encode")
        parts = self.family.prompt(pixels)
        return self._compressed(image, tokens, parts, clock.times, self.method, self.keep, question)

    def compress(
        self, encoded: EncodedImage, method: Method, keep: int | float, question: str = CAPTION_PROMPT
    ) -> EncodedImage:
        """The same encoded picture under another method and budget."""
        return self._compressed(
            encoded.image, encoded.tokens, encoded.parts, encoded.timings_ms, method, keep, question
        )  # fmt: skip

    def _compressed(
        self, image: Image, tokens: VisionTokens, parts: tuple[str | int, ...], times: Mapping[str, float],
        method: Method, keep: int | float, question: str,
    ) -> EncodedImage:  # fmt: skip
        clock = _Clock()
        asked = "query" in method.needs | method.wants
        query = self._embedded(question, special=False) if asked else None
        with self._pools.limit(limits=self.threads, user_api="blas"):
            plan = method.compress(tokens, keep, seed=self.seed, query=query)
        kept = np.asarray(tokens.rows(plan), np.float32)
        crop = tokens.layout.crop[plan.keep]
        rows = np.concatenate([
            kept[crop == part] if isinstance(part, int) else self._embedded(part, special=True) for part in parts
        ])  # fmt: skip
        clock.stop("compress")
        return EncodedImage(
            image, tokens, plan, rows, parts, {**times, **clock.times}, method, keep, question if asked else None
        )

    def _embedded(self, text: str, *, special: bool) -> NDArray[np.float32]:
        """``(n, width)``: the rows the language model's own table holds for ``text``; ``special`` obeys its tokens."""
        return self.embedding.lookup(self.model.tokenize(text, add_special=False, parse_special=special))

    @overload
    def caption(self, picture: Picture, *, stream: Literal[False] = ..., **options: Any) -> str: ...
    @overload
    def caption(self, picture: Picture, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
    def caption(self, picture: Picture, *, stream: bool = False, **options: Any) -> str | Iterator[str]:
        """Describe a picture; ``stream=True`` yields the text as it comes. ``options`` as for ``answer``."""
        if not stream:
            return self.answer(picture, CAPTION_PROMPT, **options).text
        return self._stream(picture, CAPTION_PROMPT, **options)

    @overload
    def ask(self, picture: Picture, question: str, *, stream: Literal[False] = ..., **options: Any) -> str: ...
    @overload
    def ask(self, picture: Picture, question: str, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
    def ask(self, picture: Picture, question: str, *, stream: bool = False, **options: Any) -> str | Iterator[str]:
        """Answer a question about a picture, or about several in a list; ``options`` as for ``answer``."""
        if not stream:
            return self.answer(picture, question, **options).text
        return self._stream(picture, question, **options)

    def answer(
        self, picture: Picture, question: str = CAPTION_PROMPT, *, max_tokens: int = 256, stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Answer:  # fmt: skip
        """Answer with everything that is known about how; greedy unless ``sampling`` says otherwise.

        The image's rows stay in the language model until another image is asked about, so a further question about
        the same ``EncodedImage`` costs its own tokens only.
        """
        encoded = self._encode_all(picture, question)
        rows, prefill = self._prompt(encoded, question)
        try:
            generation = self._generate(rows, sampling, max_tokens, stop)
            text = generation.text()
            prompt_tokens = self.decoder.length(_PREFIX) + len(rows)
        finally:
            self.decoder.drop(_ANSWER)
        new = [image for image in encoded if image not in self._timed]
        self._timed.update(new)
        timings = {stage: sum(image.timings_ms[stage] for image in new) for stage in _IMAGE_STAGES}
        timings["prefill"] = (prefill + generation.first_token_s) * 1e3
        timings["first_token"] = sum(timings.values())
        timings["generate"] = generation.generate_s * 1e3
        return Answer(
            text.strip(), generation.finish_reason or "stop", sum(e.plan.before for e in encoded),
            sum(len(e.plan) for e in encoded), prompt_tokens, len(generation.tokens), timings, tuple(encoded),
        )  # fmt: skip

    def rows_needed(self, question: str = CAPTION_PROMPT) -> int:
        """Rows of context that a question about one picture takes at least: text, kept tokens, one token of answer.

        Raises ``TokcompError`` for a question that the model's chat template cannot write.
        """
        pieces = chat_prompt(self.model, question, 1).tokenize(self.model)
        patches = self.spec.patches
        kept = tokens_to_keep(self.keep, patches) if self.method.compresses else patches
        return sum(len(piece) for piece in pieces) + kept + 1

    def close(self) -> None:
        """Free the language model; a second call does nothing, a question after it raises ``ValueError``."""
        self._end_stream()
        self._closed = True
        self._stack.close()

    def __enter__(self) -> VLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, picture: Picture) -> Image:
        if isinstance(picture, Image):
            return picture
        if isinstance(picture, Pil.Image):
            return wrap_image(picture, max_pixels=self.max_pixels)
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise UsageError(f"a picture array must be (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
            return wrap_image(Pil.fromarray(picture), max_pixels=self.max_pixels)
        return open_image(picture, max_pixels=self.max_pixels)

    def _tokens(self, pixels: Pixels) -> VisionTokens:
        """Run the tower on all crops and lay their rows end to end."""
        output = self.tower.encode(pixels.crops)
        attention = output.cls_attention
        return VisionTokens(
            output.features.reshape(-1, output.features.shape[-1]),
            self.family.layout(pixels),
            partial(_project, self.tower),
            None if attention is None else np.concatenate(list(attention), axis=-1),
        )

    def _encode_all(self, picture: Picture, question: str) -> list[EncodedImage]:
        pictures = picture if isinstance(picture, (list, tuple)) else [picture]
        if not pictures:
            raise UsageError("an empty list holds no picture to ask about")
        return [self.encode(each, question) for each in pictures]

    def _prompt(self, images: Sequence[EncodedImage], question: str) -> tuple[Rows, float]:
        """Bring the prompt up to the last image into the language model; the rows of the rest, and seconds spent."""
        if self._closed:
            raise ValueError("the model is closed; load it again")
        self._end_stream()
        pieces = chat_prompt(self.model, question, len(images)).tokenize(self.model)
        key = (*(piece.tobytes() for piece in pieces[:-1]), *images)
        started = time.perf_counter()
        if key != self._held:
            self._held = None
            self.decoder.clear()
            text = [self.embedding.lookup(piece) for piece in pieces[:-1]]
            lead = [part for pair in zip(text, (image.rows for image in images), strict=True) for part in pair]
            if lead:
                self._decode_prefix(np.concatenate(lead), len(pieces[-1]))
            self._held = key
        self.decoder.drop(_ANSWER)
        self.decoder.fork(_PREFIX, _ANSWER)
        return self.embedding.rows(pieces[-1], self.decoder.length(_ANSWER), _ANSWER), time.perf_counter() - started

    def _decode_prefix(self, rows: NDArray[np.float32], tail: int) -> None:
        if len(rows) + tail + 1 > self.decoder.n_ctx:
            raise TokcompError(
                f"image and prompt need {len(rows) + tail + 1} rows of context, there are {self.decoder.n_ctx}; "
                "keep fewer image tokens, ask less, or raise n_ctx (--ctx)"
            )
        silent = np.zeros(len(rows), np.bool_)
        self.decoder.decode(
            [Rows(rows, np.arange(len(rows), dtype=np.int32), _PREFIX, silent)], causal=self.family.causal
        )

    def _generate(self, rows: Rows, sampling: Sampling | None, max_tokens: int, stop: Sequence[str]) -> Generation:
        sampling = sampling or Sampling(seed=self.seed)
        return generate(self.decoder, self.model, self.embedding, [rows], sampling, max_tokens=max_tokens, stop=stop)

    def _end_stream(self) -> None:
        """An answer that nobody reads to its end must not hold the sequence; going on with it raises."""
        if self._streaming is not None:
            self._streaming.end()
            self._streaming = None

    def _stream(
        self, picture: Picture, question: str, *, max_tokens: int = 256, stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[str]:  # fmt: skip
        rows, _ = self._prompt(self._encode_all(picture, question), question)

        self._streaming = AnswerStream(
            self._generate(rows, sampling, max_tokens, stop), partial(self.decoder.drop, _ANSWER)
        )
        return self._streaming


def _project(tower: Tower, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return tower.project(np.ascontiguousarray(rows, np.float32))


class _Clock:
    """Milliseconds between stops, by name."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = (now - self._last) * 1e3
        self._last = now
