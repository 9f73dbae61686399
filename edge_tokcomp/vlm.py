"""The pipeline: picture -> tokens -> plan -> rows -> text. Nothing else assembles it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from .answers import Answer, EncodedImage, Facts, SeenImage
from .asking import Asker
from .budget import largest_share, parse_keep
from .division import Division, Halves, divide, language_work
from .dynamic import Calibration, Claim, Mode, Share, Sharing, sharing_of
from .encoded_cache import EncodedCache
from .encoder import ImageEncoder, Picture
from .engines import EngineName, check_engine, open_engine
from .errors import TokcompError, UsageError
from .families.base import Tokens
from .images import MAX_PIXELS
from .language.requests import Request
from .language.sampling import Sampling
from .language.segment import available_cores
from .language.segmented import SegmentedDecoder
from .language.token_embedding import TokenEmbedding
from .methods import Method, get_method
from .methods.layer_step import LayerStep
from .methods.layer_steps import read_layer_steps
from .pairing import check_pair, check_positions
from .pipeline import Ask, Pipeline
from .segmenting import model_name, open_language
from .tokens import Rows
from .tower import Precision, Provider

T = TypeVar("T")

DEFAULT_METHOD = "mosaic"
DEFAULT_KEEP = 0.25
"""Of a method that is named without a budget. Both by docs/matrix.md: the best from 128 of 576 tokens down, and about
where answers begin to suffer."""

DEFAULT_PARALLEL = 16

CAPTION_PROMPT = "Describe the image."

_THREADS_A_CORE = 4
"""More threads than that only wait for each other, in thousands for ever."""


def load(
    lm: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    *,
    method: str | Method | None = None,
    keep: str | int | float | None = None,
    dynamic: Mode | float | None = None,
    precision: Precision | None = None,
    provider: Provider = "auto",
    engine: EngineName = "auto",
    layer_steps: str | Sequence[str | LayerStep] = (),
    gpu_layers: int = 0,
    threads: int | None = None,
    n_ctx: int | None = None,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    parallel: int = DEFAULT_PARALLEL,
    cache: EncodedCache | None = None,
) -> VLM:
    """Open a vision-language model: ``lm`` and ``mmproj`` GGUF files, or the bundled demo model when neither is named.

    ``lm`` may be a directory of layer segments (``edge-tokcomp split``), ``mmproj`` that of a tower (``edge-tokcomp
    export``). ``precision``: of our tower, fp32 unless a tower's directory has another.
    ``keep``: image tokens kept, an int or a fraction; a quarter when only ``method`` is given. ``method``: a name
    (``edge-tokcomp methods``) or a ``Method``; ``mosaic`` when only ``keep`` is given. With neither nothing is
    compressed. ``layer_steps``: drop image tokens inside the language model too, as
    ``"spectrum@8:0.5,16:0.25,24:0"``, several joined by ``+``; the file is cut at these layers, once, in the cache.
    ``engine``: what looks at pictures, our own tower (``onnx``) or llama.cpp's (``mtmd``); ours where there is one.
    ``dynamic``: give pictures with much to see more than ``keep`` and others less, so that the mean holds; the
    pictures of one request share exactly, and one by itself is measured against the ``running`` mean of those before,
    the ``calibrated`` mean of the model (see ``VLM.calibrate``) or a mean given as a number; with ``batch`` it needs
    ``VLM.encode_all``. ``threads``: one budget for ONNX Runtime, BLAS and llama.cpp; all cores by default. ``n_ctx``:
    rows of context; by default the model's own up to 4096. ``parallel``: pictures that ``answer_all`` has in the
    language model at once, as far as the context holds them. ``cache``: keeps what the tower says of pictures; 64 MiB
    in memory by default. The first load of an mmproj builds its ONNX tower, in a
    cache.

    Raises ``TokcompError`` for files that are missing, damaged or do not fit each other, ``UsageError`` for options.
    """
    for name, value in (("threads", threads), ("n_ctx", n_ctx), ("parallel", parallel)):
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
        keep = DEFAULT_KEEP
    budget = 1.0 if keep is None else parse_keep(keep)
    sharing = sharing_of(dynamic, chosen, keep)
    steps = read_layer_steps(layer_steps)
    Sampling(seed=seed)  # refuses a seed out of range before the files are read
    return VLM(
        Path(lm), Path(mmproj), chosen, budget if chosen.compresses else 1.0, sharing=sharing,
        layer_steps=steps, precision=precision, provider=provider, engine=engine, gpu_layers=gpu_layers,
        threads=threads or cores, n_ctx=n_ctx, seed=seed, max_pixels=max_pixels, parallel=parallel,
        cache=EncodedCache() if cache is None else cache,
    )  # fmt: skip


class VLM:
    """A loaded model. Use as a context manager, or ``close``. Not for several threads at once."""

    name: str
    """Of the language model's file, or of that its segments were cut from."""

    def __init__(
        self, lm: Path, mmproj: Path, method: Method, keep: int | float, *, sharing: Sharing | None,
        layer_steps: tuple[LayerStep, ...], precision: Precision | None, provider: Provider,
        engine: EngineName, gpu_layers: int, threads: int, n_ctx: int | None, seed: int, max_pixels: int,
        parallel: int, cache: EncodedCache,
    ) -> None:  # fmt: skip
        self.lm, self.mmproj, self.method, self.keep, self.sharing = lm, mmproj, method, keep, sharing
        self.name = model_name(lm)
        self.seed, self.threads, self.parallel = seed, threads, parallel
        check_engine(engine)
        check_pair(lm, mmproj)
        with ExitStack() as stack:
            self.model, self.decoder = open_language(
                stack, lm, layer_steps, gpu_layers=gpu_layers, threads=threads, n_ctx=n_ctx, n_sequences=1 + parallel
            )
            self.embedding = TokenEmbedding(self.model.path, row_width=self.decoder.row_width)
            self.engine = open_engine(
                stack, engine, mmproj, self.model, row_width=self.decoder.row_width, precision=precision,
                provider=provider, threads=threads, gpu=gpu_layers != 0, method=method, keep=keep,
                cache=cache,
            )  # fmt: skip
            self.encoder = ImageEncoder(self.engine, self._embedded, threads=threads, seed=seed, max_pixels=max_pixels)
            width = self.engine.row_width
            if width != self.decoder.row_width:
                raise TokcompError(
                    f"{mmproj} writes rows of {width}, {lm} takes {self.decoder.row_width}; "
                    "the two files are not of one model"
                )
            positions: Literal["line", "grid"] = "grid" if self.model.multi_position else "line"
            check_positions(lm, positions, mmproj, self.engine.positions)
            if sharing and sharing.by == "calibrated":
                sharing.mean = Calibration.stored(self.engine.directory, mmproj).mean
            self.layer_steps = layer_steps
            self.on_gpu = gpu_layers != 0 or self.engine.on_gpu
            self.division = Division(threads, threads, self.on_gpu, "as it was loaded")
            self.asker = Asker(self.model, self.decoder, self.embedding, self.engine, seed=seed)
            self._stack = stack.pop_all()

    def see(self, picture: Picture) -> SeenImage:
        """Decode, preprocess and run the tower: what ``encode``, ``compress`` and ``claim`` would begin with.

        Raises ``ImageError`` for a picture that cannot be read.
        """
        return self.encoder.see(picture, self.method, self.keep)

    def encode(self, picture: Picture, question: str = CAPTION_PROMPT, *, share: Share | None = None) -> EncodedImage:
        """Decode, preprocess, run the tower, choose what to keep, project it.

        ``question``: what will be asked, for methods that keep what matters to it. ``share``: what the picture was
        given of a shared budget, where that has been decided.
        Raises ``ImageError`` for a picture that cannot be read.
        """
        if share is None and self.sharing and self.sharing.by == "batch" and not isinstance(picture, EncodedImage):
            raise UsageError(
                "dynamic batch: a picture by itself has none to share its budget with; give all of them to encode_all, "
                "or use dynamic calibrated"
            )
        if share is not None:
            return self.encoder.compress(self.see(picture), self.method, share.keep, question, share)
        return self.encode_all([picture], question)[0]

    def encode_all(self, pictures: Sequence[Picture], question: str = CAPTION_PROMPT) -> list[EncodedImage]:
        """``encode`` for the pictures of one request, held in memory together.

        With ``dynamic`` they share their budget: what they keep sums to what it would be without. Those that come
        encoded stay as they are.
        """
        seen = [picture if isinstance(picture, EncodedImage) else self.see(picture) for picture in pictures]
        new = [image for image in seen if not isinstance(image, EncodedImage)]
        started = time.perf_counter()
        shares = self.sharing.shares([self.claim(image) for image in new]) if self.sharing else [None] * len(new)
        scoring = (time.perf_counter() - started) * 1e3 / max(len(new), 1)
        made = []
        for image, share in zip(new, shares, strict=True):
            keep = share.keep if share else self.keep
            made.append(self.encoder.compress(image, self.method, keep, question, share))
            made[-1].timings_ms["compress"] += scoring
        fresh = iter(made)
        return [self._again(image, question) if isinstance(image, EncodedImage) else next(fresh) for image in seen]

    def _again(self, encoded: EncodedImage, question: str) -> EncodedImage:
        if encoded.question in (None, question):
            return encoded
        return self.encoder.compress(encoded, encoded.method, encoded.keep, question, encoded.share)

    def claim(self, picture: Picture) -> Claim:
        """How much there is to see in a picture, and the tokens it would have by itself."""
        return Claim.of(self.encoder.see(picture).tokens, self.keep)

    def calibrate(self, pictures: Iterable[Picture]) -> float:
        """The mean information score of ``pictures``, stored for this tower and its precision.

        Models loaded with ``dynamic="calibrated"`` from then on measure theirs against it. Raises ``ImageError`` for a
        picture that cannot be read, ``UsageError`` without any.
        """
        found = Calibration.of([self.claim(picture).information for picture in pictures])
        found.save(self.engine.directory)
        return found.mean

    def set_layer_steps(self, steps: str | Sequence[str | LayerStep]) -> None:
        """Drop image tokens by other layer steps from now on, at layers where the model is cut, or by none.

        Raises ``UsageError`` for other layers, and for any steps where the model was loaded whole.
        """
        chosen = read_layer_steps(steps)
        if isinstance(self.decoder, SegmentedDecoder):
            self.asker.forget()
            self.decoder.set_steps(chosen)
        elif chosen:
            raise UsageError("the model was loaded whole; load it with layer_steps, or from a directory of segments")
        self.layer_steps = chosen

    def compress(
        self, seen: SeenImage, method: Method, keep: int | float, question: str = CAPTION_PROMPT
    ) -> EncodedImage:
        """A picture that was seen or encoded under another method and budget."""
        return self.encoder.compress(seen, method, keep, question)

    def _embedded(self, text: str | Tokens, special: bool) -> Rows:
        if isinstance(text, Tokens):
            return self.embedding.rows(text.ids, 0)
        return self.embedding.rows(self.model.tokenize(text, add_special=False, parse_special=special), 0)

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
        return self.asker.answer(self._asked_about(picture, question), question, sampling, max_tokens, stop)

    def answer_all(
        self, pictures: Iterable[Picture], question: str = CAPTION_PROMPT, *, max_tokens: int = 256,
        stop: Sequence[str] = (), sampling: Sampling | None = None,
    ) -> Iterator[Answer | TokcompError]:  # fmt: skip
        """Answer one question about each of many pictures, ``parallel`` of them at once, in their order.

        ``pictures`` is read in a thread as they are needed. One that cannot be read, or answered, comes as the error
        that ``answer`` would raise. Nothing else may be asked before the last.
        """
        asks = (Ask(None, picture, question) for picture in pictures)
        with closing(self.answer_each(asks, max_tokens=max_tokens, stop=stop, sampling=sampling)) as answers:
            for _, outcome in answers:
                if isinstance(outcome, (Answer, TokcompError)):
                    yield outcome
                elif outcome is not None:
                    raise outcome

    def answer_each(
        self, asks: Iterable[Ask[T]], *, max_tokens: int = 256, stop: Sequence[str] = (),
        sampling: Sampling | None = None, stopped: Callable[[], bool] = lambda: False,
    ) -> Pipeline[T]:  # fmt: skip
        """As ``answer_all``, each with a question of its own and known by its tag; ``stopped``: see ``Pipeline``."""

        def encode(ask: Ask[T]) -> tuple[Request, Facts]:
            images = self._asked_about(ask.picture, ask.question, ask.share)
            return self.asker.request(images, ask.question, sampling, max_tokens, stop)

        note = self.sharing.note if self.sharing else None
        pipeline = Pipeline(
            asks, encode, self.asker.scheduler(), note=note, beside=self.division.beside, stopped=stopped
        )
        self.asker.watch(pipeline)
        return pipeline

    def divide_threads(self, picture: Picture, question: str = CAPTION_PROMPT, *, max_tokens: int = 256) -> Division:
        """Measure on ``picture`` how ``answer_all`` had best use the threads, and use them so from now on.

        The tower and the language model either take turns with all of them, or run beside each other with a part each;
        where one of them is on a GPU they run beside each other. Raises ``ImageError`` for a picture that cannot be
        read.
        """
        self.asker.forget()
        seen = self.encoder.see(picture, self.method, self.keep)
        image = replace(seen.image, sha256="")  # so that no cache knows it

        def encode() -> EncodedImage:
            return self.encoder.compress(self.see(image), self.method, self.keep, question)

        if self.on_gpu:
            self.division = Division(self.threads, self.threads, True, "one of them is on a GPU")
            return self.division
        request, _ = self.asker.request([encode()], question, None, max_tokens, ())
        work = language_work(self.decoder, self.embedding, request, causal=self.engine.causal, parallel=self.parallel)
        self.division = divide(Halves(encode, work, self.set_threads), self.threads)
        self.decoder.clear()
        return self.division

    def set_threads(self, tower: int, language: int | None = None) -> None:
        """Compute with so many threads from now on, in turns unless ``divide_threads`` found otherwise."""
        self.engine.set_threads(tower)
        self.decoder.set_threads(tower if language is None else language)

    def rows_needed(self, question: str = CAPTION_PROMPT, *, most: bool = False) -> int:
        """Rows of context that a question about one picture takes at least: text, kept tokens, one token of answer.

        With ``dynamic``, of a picture that gets the mean, or with ``most`` as much as any can get.
        Raises ``TokcompError`` for a question that the model's chat template cannot write.
        """
        pieces = self.asker.written(question, 1).tokenize(self.model)
        kept = self.engine.kept(self.method, self.keep)
        if most and self.sharing:
            kept = largest_share(kept, self.engine.crop_tokens)
        return sum(len(piece) for piece in pieces) + kept + 1

    def close(self) -> None:
        """Free the language model; a second call does nothing, a question after it raises ``ValueError``."""
        self.asker.close()
        self._stack.close()

    def __enter__(self) -> VLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asked_about(self, picture: Picture, question: str, share: Share | None = None) -> list[EncodedImage]:
        self.asker.written(question, 1)  # refuses what cannot be asked before the tower runs
        if not isinstance(picture, (list, tuple)):
            return [self.encode(picture, question, share=share)]
        if not picture:
            raise UsageError("an empty list holds no picture to ask about")
        return self.encode_all(picture, question)

    def _stream(
        self, picture: Picture, question: str, *, max_tokens: int = 256, stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[str]:  # fmt: skip
        return self.asker.stream(self._asked_about(picture, question), question, sampling, max_tokens, stop)
