"""What decides a caption apart from the picture: prompt and length, the model's part in it, and what was chosen."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace

from .errors import UsageError
from .files import fingerprint
from .language.prompt import chat_prompt
from .methods.layer_step import spell_steps
from .segmenting import model_files
from .sources import Source
from .tower_engine import tower_file
from .vlm import CAPTION_PROMPT, VLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a caption, apart from model and picture.

    ``prompt`` may hold ``{stem}`` and ``{parent}``, the names of a picture and of its folder.
    """

    prompt: str = CAPTION_PROMPT
    max_tokens: int = 256

    def for_source(self, source: Source) -> Parameters:
        """With the placeholders of the prompt filled in."""
        if not self.varies:
            return self
        return self.filled(source.path.stem, source.path.absolute().parent.name)

    def filled(self, stem: str, parent: str) -> Parameters:
        """With these words in place of the placeholders."""
        return replace(self, prompt=self.prompt.replace("{stem}", stem).replace("{parent}", parent))

    @property
    def varies(self) -> bool:
        """Whether the prompt is another for every picture."""
        return "{stem}" in self.prompt or "{parent}" in self.prompt


def prompt_rows(vlm: VLM, parameters: Parameters, *, most: bool = False) -> int:
    """Rows of context that a picture and the prompt take at least, placeholders being a short word each.

    ``most``: with the largest share that a picture can have of a shared budget.
    Raises ``TokcompError`` for a prompt that cannot be asked.
    """
    return vlm.rows_needed(parameters.filled("a", "a").prompt, most=most) - 1  # without the first token of the answer


def check_context(vlm: VLM, parameters: Parameters) -> str:
    """Whether picture, prompt and caption fit the context: ``""``, or a line that says why captions may be cut short.

    Raises ``UsageError`` when there is no room for a caption at all, and what ``prompt_rows`` does.
    """
    n_ctx, asked = vlm.decoder.n_ctx, prompt_rows(vlm, parameters)
    if asked + 1 > n_ctx:
        raise UsageError(
            f"image and prompt need {asked + 1} rows of context, there are {n_ctx}; "
            "shorten --prompt, keep fewer image tokens or raise --ctx"
        )
    most = prompt_rows(vlm, parameters, most=True)
    if most + parameters.max_tokens <= n_ctx:
        return ""
    return (
        f"image and prompt take {'up to ' * (most > asked)}{most} rows of context, a caption up to "
        f"{parameters.max_tokens}, there are {n_ctx}: "
        "longer captions will be cut short; raise --ctx or lower --max-tokens"
    )


def params_hash(vlm_hash: str, parameters: Parameters) -> str:
    """Identifies model files, method, budget, context, prompt and length: a change of any makes pictures due again."""
    return hashlib.sha256(json.dumps([vlm_hash, asdict(parameters)]).encode()).hexdigest()[:16]


def hash_of_model(vlm: VLM) -> str:
    """Identifies the model's files and everything set at its loading that decides a caption."""
    values = {
        "lm": fingerprint(*model_files(vlm.lm)), "mmproj": fingerprint(tower_file(vlm.mmproj)),
        "method": repr(vlm.method), "keep": vlm.keep, "layer_steps": repr(vlm.layer_steps),
        "dynamic": vlm.sharing and vlm.sharing.key, "seed": vlm.seed, "engine": vlm.engine.name,
        "precision": vlm.engine.precision, "n_ctx": vlm.decoder.n_ctx,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def automatic_choices(vlm: VLM, prompt: str) -> dict[str, str | int]:
    """What was chosen where the user may have left it open, with the reason where there is one."""
    written = chat_prompt(vlm.model, prompt, 1, vlm.engine.markers, vlm.engine.written)
    choices: dict[str, str | int] = {
        "engine": vlm.engine.name, "provider": vlm.engine.reason, "precision": vlm.engine.precision,
        "n_ctx": vlm.decoder.n_ctx, "threads": vlm.threads, "division": str(vlm.division),
        "parallel": vlm.parallel, "prompt_form": written.form, "prompt_reason": written.reason,
    }  # fmt: skip
    if vlm.layer_steps:
        choices |= {"layer_steps": spell_steps(vlm.layer_steps), "positions": vlm.decoder.positions}
    logger.info("%s", ", ".join(f"{name} {value}" for name, value in choices.items()))
    return choices
