"""What is measured: one caption from the bytes of a picture on, and many of them. Greedy, of forced length."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

from ..division import Division
from ..encoded_cache import EncodedCache
from ..errors import TokcompError
from ..language.sampling import Sampling
from ..language.token_embedding import bare_rows
from ..methods import get_method
from ..vlm import VLM, load

BASELINE = "MTMDChatHandler"

_PLAIN_TOKEN = 5
"""A whole character, and no end, in every vocabulary met with."""
_STEPS = 6
"""In a measure of steps; the first does not count."""


@dataclass(frozen=True)
class Setting:
    """What all contenders have alike. ``precision``: of our tower; ``parallel``: captions that we generate at once."""

    lm: str
    mmproj: str
    prompt: str
    tokens: int
    threads: int
    n_ctx: int
    precision: str
    parallel: int


@dataclass(frozen=True)
class Caption:
    """Seconds of one caption: to the ``first`` token and in ``whole``; ``stages_ms`` of ours; rows of the ``prompt``,
    image ``tokens`` before and after."""

    first: float
    whole: float
    stages_ms: dict[str, float]
    prompt: int
    tokens: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Contender(Protocol):
    """Something that captions pictures."""

    def caption(self, arm: str, picture: bytes) -> Caption:
        """One, with nothing of it known before."""

    def batch(self, arm: str, pictures: Sequence[bytes]) -> float:
        """Seconds for all, in the fastest way there is."""

    def steps(self, count: int, rows: int) -> tuple[float, int]:
        """Seconds of one step in which ``count`` sequences generate a token each behind ``rows`` rows of their own, and
        how many rows those were: fewer where the context does not hold as many of each."""


class Ours:
    """This package; an arm is a method and its budget, as ``mosaic 64`` or ``none``."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.vlm: VLM = load(
            setting.lm, setting.mmproj, threads=setting.threads, n_ctx=setting.n_ctx, parallel=setting.parallel,
            precision=setting.precision,  # type: ignore[arg-type]
            cache=EncodedCache(0),
        )  # fmt: skip
        self.sampling = Sampling(ignore_end=True)
        self.divisions: dict[str, Division] = {}

    def caption(self, arm: str, picture: bytes) -> Caption:
        """From reading the bytes to the last token."""
        self._choose(arm)
        started = time.perf_counter()
        answer = self.vlm.answer(picture, self.setting.prompt, max_tokens=self.setting.tokens, sampling=self.sampling)
        whole = time.perf_counter() - started
        if answer.generated_tokens != self.setting.tokens:
            raise TokcompError(f"{arm}: {answer.generated_tokens} tokens came, not {self.setting.tokens}")
        return Caption(
            whole - answer.timings_ms["generate"] / 1e3, whole, answer.timings_ms, answer.prompt_tokens,
            (answer.tokens_before, answer.tokens_after),
        )  # fmt: skip

    def batch(self, arm: str, pictures: Sequence[bytes]) -> float:
        """By ``answer_all``, whose threads are divided by the first picture, once an arm."""
        self._choose(arm)
        division = self.divisions.get(arm)
        if division is None:
            division = self.vlm.divide_threads(pictures[0], self.setting.prompt, max_tokens=self.setting.tokens)
            self.divisions[arm] = division
        self.vlm.set_threads(division.tower, division.language)
        self.vlm.division = division
        started = time.perf_counter()
        answers = list(
            self.vlm.answer_all(pictures, self.setting.prompt, max_tokens=self.setting.tokens, sampling=self.sampling)
        )
        seconds = time.perf_counter() - started
        for answer in answers:
            if isinstance(answer, TokcompError):
                raise answer
            if answer.generated_tokens != self.setting.tokens:
                raise TokcompError(f"{arm}: {answer.generated_tokens} tokens came, not {self.setting.tokens}")
        self.vlm.set_threads(self.setting.threads)
        return seconds

    def steps(self, count: int, rows: int) -> tuple[float, int]:
        """The median of some. No sequence shares rows with another, since those of pictures differ.

        Raises ``TokcompError`` where not even the steps fit.
        """
        decoder, embedding = self.vlm.decoder, self.vlm.embedding
        behind = min(rows, decoder.n_ctx // count - _STEPS)
        if behind < 1:
            raise TokcompError(
                f"{count} captions at once do not fit {decoder.n_ctx} rows of context; ask for fewer (--parallel) or "
                "more rows (--ctx)"
            )
        self.vlm.asker.forget()
        decoder.clear()
        numbers = range(1, count + 1)
        for number in numbers:
            decoder.decode([embedding.rows([0] * behind, 0, number)])
        generated = bare_rows if decoder.takes_bare else embedding.rows
        times = []
        for _ in range(_STEPS):
            batch = [generated([0], decoder.length(number), number) for number in numbers]
            started = time.perf_counter()
            decoder.decode(batch)
            times.append(time.perf_counter() - started)
        decoder.clear()
        return median(times[1:]), behind

    def _choose(self, arm: str) -> None:
        method, _, keep = arm.partition(" ")
        self.vlm.method = get_method(method)
        self.vlm.keep = int(keep) if keep else 1.0


class Baseline:
    """llama-cpp-python's own way to caption a picture, one at a time: there is no other."""

    def __init__(self, setting: Setting) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import MTMDChatHandler

        self.setting = setting
        self.llama: Any = Llama(
            setting.lm, chat_handler=MTMDChatHandler(setting.mmproj, verbose=False, use_gpu=False), n_gpu_layers=0,
            n_ctx=setting.n_ctx, n_threads=setting.threads, n_threads_batch=setting.threads, verbose=False,
        )  # fmt: skip
        self._first = 0.0
        self._sample = self.llama.sample
        self.llama.sample = self._noted

    def caption(self, arm: str, picture: bytes) -> Caption:
        """From the bytes to the last token."""
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.setting.prompt}]
        self._first = 0.0
        started = time.perf_counter()
        result = self.llama.create_chat_completion(
            [{"role": "user", "content": parts}], max_tokens=self.setting.tokens, temperature=0.0, repeat_penalty=1.0
        )
        whole = time.perf_counter() - started
        usage = result["usage"]
        if usage["completion_tokens"] != self.setting.tokens:
            raise TokcompError(f"{arm}: {usage['completion_tokens']} tokens came, not {self.setting.tokens}")
        return Caption(self._first - started, whole, {}, usage["prompt_tokens"], (0, 0))

    def batch(self, arm: str, pictures: Sequence[bytes]) -> float:
        """One after another."""
        return sum(self.caption(arm, picture).whole for picture in pictures)

    def steps(self, count: int, rows: int) -> tuple[float, int]:
        raise TokcompError(f"{BASELINE} generates one text at a time, not {count}")

    def _noted(self, *arguments: Any, **options: Any) -> int:
        """``Llama.sample``, noting when the first token was known. What it chose is replaced, so that all texts are of
        one length: an end token would end it, and a part of a character keeps llama-cpp-python going beyond it."""
        self._sample(*arguments, **options)
        self._first = self._first or time.perf_counter()
        return _PLAIN_TOKEN
