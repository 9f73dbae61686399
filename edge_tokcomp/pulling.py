"""Which files of a repository are a language model and its mmproj: names in, names out, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from .errors import TokcompError, UsageError

QUANTISATIONS = ("Q4_K_M", "Q4_K", "Q4_K_S", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0", "F16", "BF16", "F32")
"""What is taken of a language model that is not named further. Q4_K is what Q4_K_M was called in older files."""

MMPROJ_KINDS = ("F16", "BF16", "Q8_0", "F32")
"""The same for an mmproj, in which converters write F16; F32 is twice as large and comes last."""

_QUANTISATION = re.compile(
    r"(?<![A-Z0-9])(?:(?:UD-)?(?:I?Q|TQ)[0-9]+(?:_(?:K|[0-9]+|XXS|XS|S|M|L|XL|NL))*|BF16|FP?16|FP?32|MXFP4(?:_MOE)?"
    r"|NVFP4|INT[48])(?![A-Z0-9])",
    re.IGNORECASE,
)
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-")
"""What files are called that lie beside language models: projectors, statistics, drafts (as llama.cpp has it)."""
_MOST_NAMES = 12


@dataclass(frozen=True)
class Choice:
    """Names in a repository: ``lm`` in all its parts, in order, and its ``mmproj``; ``reason`` is for people."""

    lm: tuple[str, ...]
    mmproj: str
    reason: str


def read_name(text: str) -> tuple[str, str]:
    """``OWNER/NAME`` and what stands behind a colon, or ``""``; raises ``UsageError`` for anything else."""
    repository, colon, tag = text.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII) or bool(colon) != bool(tag):
        raise UsageError(f"{text}: write OWNER/NAME or OWNER/NAME:Q4_K_M, as on huggingface.co")
    return repository, tag


def choose(repository: str, names: Collection[str], tag: str = "") -> Choice:
    """The language model and the mmproj among ``names``.

    ``tag`` is a quantisation in any case (``Q4_K_M``; ``UD-`` may be left out), or the name of a file; without it the
    first of ``QUANTISATIONS`` that is there. Raises ``TokcompError``, saying what there is, if that is no file or
    several, if a part of it is missing, or if no single mmproj belongs to it.
    """
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    models = _models(ggufs)
    if not models:
        there = f"only {_some(ggufs)}" if ggufs else "no GGUF file"
        raise TokcompError(f"{repository}: no language model, {there}; name a repository with a GGUF and its mmproj")
    found, reason = _by_tag(repository, models, tag) if tag else _by_default(repository, models)
    if len(found) > 1:
        firsts = [model[0] for model in found]
        raise TokcompError(f"{repository}: several models, {_some(firsts)}; name one, as in OWNER/NAME:{firsts[0]}")
    (lm,) = found
    for part in lm:
        if part not in ggufs:
            raise TokcompError(f"{repository}: {part} is missing, the model has {len(lm)} parts; name another")
    mmproj, why = _mmproj(repository, lm[0], [name for name in ggufs if "mmproj" in _file(name).lower()])
    return Choice(lm, mmproj, f"language model {reason}; mmproj {why}")


def quantisation(name: str) -> str:
    """What a file name, or else the name of its folder, says of the weights in it: ``Q4_K_M``, or ``""``."""
    path = PurePosixPath(name)
    for text in (path.stem, path.parent.name):
        found = _QUANTISATION.findall(text)
        if found:
            return _spelt(found[-1])
    return ""


def _spelt(tag: str) -> str:
    return tag.upper().replace("FP", "F") if tag.upper() in ("FP16", "FP32") else tag.upper()


def _file(name: str) -> str:
    return PurePosixPath(name).name


def _models(ggufs: Sequence[str]) -> list[tuple[str, ...]]:
    """Each language model as its files; a part that is missing is named all the same."""
    models: list[tuple[str, ...]] = []
    for name in ggufs:
        if any(word in _file(name).lower() for word in _NO_MODEL):
            continue
        part = _PART.fullmatch(name)
        if part is None:
            models.append((name,))
        elif int(part[2]) == 1:
            models.append(tuple(f"{part[1]}-{number:05}-of-{part[3]}.gguf" for number in range(1, int(part[3]) + 1)))
    return models


def _by_tag(repository: str, models: list[tuple[str, ...]], tag: str) -> tuple[list[tuple[str, ...]], str]:
    if tag.lower().endswith(".gguf"):
        found = [model for model in models if tag in model or tag in map(_file, model)]
        if not found:
            there = _some([model[0] for model in models])
            raise TokcompError(f"{repository}: no language model {tag}; there is {there}")
        return found, f"{tag}, as named"
    wanted = _spelt(tag)
    found = [model for model in models if quantisation(model[0]) == wanted]
    found = found or [model for model in models if quantisation(model[0]).removeprefix("UD-") == wanted]
    if not found:
        raise TokcompError(f"{repository}: no {tag}; there is {_kinds(models)}")
    return found, f"{wanted}, as named"


def _by_default(repository: str, models: list[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], str]:
    for wanted in QUANTISATIONS:
        found = [model for model in models if quantisation(model[0]) == wanted]
        if found:
            return found, f"{wanted}, the first there is of {', '.join(QUANTISATIONS)}"
    if len(models) == 1:
        return models, f"{models[0][0]}, the only one"
    raise TokcompError(
        f"{repository}: none of {', '.join(QUANTISATIONS)}; name one of {_kinds(models)} behind a colon, as in "
        f"OWNER/NAME:{quantisation(models[0][0]) or models[0][0]}"
    )


def _mmproj(repository: str, model: str, projectors: list[str]) -> tuple[str, str]:
    """The projector beside ``model`` or in the nearest folder above, and why it."""
    if not projectors:
        raise TokcompError(f"{repository}: no mmproj, and without one a model sees nothing; name another repository")
    above = {folder: depth for depth, folder in enumerate(PurePosixPath(model).parents)}
    nearest = min((above[folder] for folder in map(_folder, projectors) if folder in above), default=None)
    if nearest is not None:
        projectors = [name for name in projectors if above.get(_folder(name)) == nearest]
    found, why = projectors, "the only one"
    for kind in MMPROJ_KINDS:
        of_kind = [name for name in projectors if quantisation(name) == kind]
        if of_kind:
            found, why = of_kind, f"{kind}, the first there is of {', '.join(MMPROJ_KINDS)}"
            break
    if len(found) > 1:
        found = [name for name in found if _model_name(name) == _model_name(model)] or found
    if len(found) > 1:
        raise TokcompError(
            f"{repository}: several mmproj files, {_some(found)}; fetch that of {_file(model)} yourself, and give "
            "it to --mmproj"
        )
    return found[0], why


def _folder(name: str) -> PurePosixPath:
    return PurePosixPath(name).parent


def _model_name(name: str) -> str:
    """A file's name without what it says of its kind, its part or its weights."""
    stem = _QUANTISATION.sub("", re.sub(r"-[0-9]{5}-of-[0-9]{5}$", "", PurePosixPath(name).stem))
    return re.sub(r"mmproj|model|text|[^a-z0-9]", "", stem.lower())


def _kinds(models: list[tuple[str, ...]]) -> str:
    return _some(sorted({quantisation(model[0]) or model[0] for model in models}))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
