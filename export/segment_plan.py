"""What each layer segment of a language model holds: which tensors, and the metadata that llama.cpp needs for them.

A segment is a model of its own to llama.cpp: what it derives from the number or the place of layers has to come out as
in the whole model. The table of architectures says which were read through in llama.cpp's source (``src/models`` of the
pinned version), and what each needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.files import fingerprint
from edge_tokcomp.language.gguf_header import GgufHeader, layer_count, read_header, split_files
from edge_tokcomp.language.model import check_language_model
from edge_tokcomp.language.row_attention import TELLING_DEPTH, WINDOW, WINDOW_PATTERN, layer_windows
from edge_tokcomp.language.segment_files import CUTTER, PREFIX

from .gguf_parts import GgufParts, Piece, Tensor, entry, entry_slice

_MOST_WIDTH = 1 << 17
_STAND_IN_TOKENS = 32
_F16 = 1

_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]*)\.(.+)")
_VOCABULARY_TENSOR = re.compile(r"(token_embd|output)\..+")
_TABLE = "token_embd.weight"
_KV_HEADS = "attention.head_count_kv"

_PER_LAYER = (
    "attention.head_count", _KV_HEADS, "feed_forward_length", "expert_feed_forward_length", "expert_used_count",
    WINDOW_PATTERN,
)  # fmt: skip
_OF_THE_WHOLE = ("rope.dimension_sections",)
"""Arrays that may be as long as the model is deep without having an entry a layer."""

_REFUSED = {
    "nextn_predict_layers": "it has layers that predict further tokens",
    "attention.shared_kv_layers": "some of its layers use the keys and values of earlier ones",
    "embedding_length_per_layer_input": "every layer is fed an embedding of the token",
    "deepstack_mapping": "image features enter at layers all over its depth",
}


@dataclass(frozen=True)
class _Architecture:
    """What cutting takes besides counting layers.

    ``on_entry``: keys that say what happens to the rows fed in, which only the first segment may do. ``hybrid``: layers
    without key-value heads are convolutions.
    """

    on_entry: tuple[str, ...] = ()
    hybrid: bool = False


_DEEPSTACK = "n_deepstack_layers"
_ARCHITECTURES = {
    "gemma3": _Architecture(),
    "granite": _Architecture(on_entry=("embedding_scale",)),
    "internlm2": _Architecture(),
    "lfm2": _Architecture(hybrid=True),
    "llama": _Architecture(),
    "mistral3": _Architecture(),
    "phi3": _Architecture(),
    "qwen2": _Architecture(),
    "qwen2vl": _Architecture(),
    "qwen3": _Architecture(),
    "qwen3vl": _Architecture(on_entry=(_DEEPSTACK,)),
}


@dataclass(frozen=True, eq=False)
class Source:
    """A language model that can be cut: ``header`` of its first file, ``tensors`` of all its files by name.

    ``windows``: see ``layer_windows``.
    """

    header: GgufHeader
    architecture: str
    depth: int
    fingerprint: str
    tensors: Mapping[str, Tensor]
    windows: Sequence[int]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Source:
        """Check the headers of a language model; raises ``TokcompError`` unless it can be cut."""
        header = check_language_model(path)
        architecture = header.text("general.architecture")
        if any(key.startswith(PREFIX) for key in header.spans):
            raise TokcompError(f"{header.path}: is a segment already; cut the whole model")
        if architecture not in _ARCHITECTURES:
            raise TokcompError(
                f"{header.path}: a {architecture} model cannot be cut into segments; these can: "
                f"{', '.join(_ARCHITECTURES)}"
            )
        depth = layer_count(header)
        _check_keys(header, architecture)
        _check_arrays(header, architecture, depth)
        files = split_files(header)
        try:
            digest = fingerprint(*files)
        except OSError as fault:
            raise TokcompError(f"{header.path}: cannot be read ({fault.strerror}); check the path") from fault
        return cls(header, architecture, depth, digest, _gather(files, depth), layer_windows(header))

    @property
    def n_bytes(self) -> int:
        """Size of the model's files, without their headers."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    def check_cuts(self, at: Sequence[int]) -> None:
        """Raises ``UsageError`` for cuts that are none or that this model does not allow."""
        text = f"cuts {','.join(map(str, at))!r}"
        if not at or list(at) != sorted(set(at)) or not 1 <= at[0] <= at[-1] < self.depth:
            raise UsageError(f"{text}: {self.header.path.name} has {self.depth} layers; name some from 1 to "
                             f"{self.depth - 1} in ascending order, as in 8,16")  # fmt: skip
        kind = _ARCHITECTURES[self.architecture]
        slices = _integer(self.header, f"{self.architecture}.{_DEEPSTACK}", 0)
        if _DEEPSTACK in kind.on_entry and at[0] <= slices:
            raise UsageError(
                f"{text}: image features enter {self.header.path.name} up to layer {slices}, which must be in the "
                f"first segment; cut at {slices + 1} or later"
            )
        bounds = [0, *at, self.depth]
        telling = TELLING_DEPTH.get(self.architecture)
        if telling in (self.depth, *(stop - start for start, stop in pairwise(bounds))):
            raise UsageError(
                f"{text}: llama.cpp computes {self.architecture} models of {telling} layers differently, so "
                "that such a model cannot be cut, and no segment may have as many"
            )
        if kind.hybrid:
            self._check_mixed(text, bounds)

    def segments(self, at: Sequence[int]) -> list[GgufParts]:
        """The files to be, for cuts that ``check_cuts`` allows."""
        bounds = [0, *at, self.depth]
        return [self._segment(number, bounds) for number in range(1, len(bounds))]

    def _check_mixed(self, text: str, bounds: Sequence[int]) -> None:
        """llama.cpp aborts the process when the layers of a hybrid model are all of one kind."""
        key = f"{self.architecture}.{_KV_HEADS}"
        heads = self.header.numbers(key) if key in self.header.arrays else [1.0] * self.depth
        for start, stop in pairwise(bounds):
            kinds = {"attention" if count else "convolutions" for count in heads[start:stop]}
            if len(kinds) < 2:
                attention = ", ".join(str(layer) for layer, count in enumerate(heads) if count)
                raise UsageError(
                    f"{text}: layers {start} to {stop - 1} are all {kinds.pop()}, but a segment of a "
                    f"{self.architecture} model needs both; layers with attention are {attention}"
                )

    def _segment(self, number: int, bounds: Sequence[int]) -> GgufParts:
        first, stop, last = bounds[number - 1], bounds[number], number == len(bounds) - 1
        own: dict[str, str | int] = {
            "index": number, "count": len(bounds) - 1, "first_layer": first, "depth": self.depth,
            "source": self.fingerprint, "cutter": CUTTER, "model": self.header.path.name,
        }  # fmt: skip
        entries = [*self._entries(first, stop, last), entry(f"{self.architecture}.block_count", stop - first)]
        entries += [entry(PREFIX + key, value) for key, value in own.items()]
        tensors = [*self._tensors(first, stop, last)]
        if not last:
            # llama.cpp takes no model without vocabulary and output; these cost next to nothing.
            entries.append(entry("tokenizer.ggml.model", "none"))
            entries.append(entry(f"{self.architecture}.vocab_size", _STAND_IN_TOKENS))
            width = self.tensors[_TABLE].shape[0]
            blank = bytes(2 * width * _STAND_IN_TOKENS)
            tensors += [Tensor(name, (width, _STAND_IN_TOKENS), _F16, blank) for name in (_TABLE, "output.weight")]
        return GgufParts(entries, tensors, _integer(self.header, "general.alignment", 32))

    def _tensors(self, first: int, stop: int, last: bool) -> Iterator[Tensor]:
        """Those of the layers, counted from 0, and those of no layer; the real vocabulary only in the last segment."""
        for name, tensor in self.tensors.items():
            match = _LAYER_TENSOR.fullmatch(name)
            if match is None:
                if last or not _VOCABULARY_TENSOR.fullmatch(name):
                    yield tensor
            elif first <= int(match[1]) < stop:
                yield replace(tensor, name=f"blk.{int(match[1]) - first}.{match[2]}")

    def _entries(self, first: int, stop: int, last: bool) -> Iterator[Piece | bytes]:
        """The model's metadata for some of its layers, without what every segment has of its own."""
        dropped = {"block_count"}
        if first:
            dropped.update(_ARCHITECTURES[self.architecture].on_entry)
        if not last:
            dropped.add("vocab_size")
        if self.windows:
            dropped.add(WINDOW_PATTERN)
            if any(self.windows[first:stop]):
                yield entry(
                    f"{self.architecture}.{WINDOW_PATTERN}", [window > 0 for window in self.windows[first:stop]]
                )
            else:
                dropped.add(WINDOW)  # llama.cpp aborts the process when no layer has the window.
        for key, (start, end) in self.header.spans.items():
            name = key.removeprefix(f"{self.architecture}.")
            if key.startswith("split.") or (key.startswith("tokenizer.") and not last):
                continue
            if name != key and name in dropped:
                continue
            piece = Piece(self.header.path, start, end - start)
            sliced = name != key and name in _PER_LAYER and key in self.header.arrays
            yield entry_slice(piece.read(), first, stop) if sliced else piece


def _check_keys(header: GgufHeader, architecture: str) -> None:
    """Refuse models that make more of their layers than their architecture usually does."""
    for key, reason in _REFUSED.items():
        if header.metadata.get(f"{architecture}.{key}") or f"{architecture}.{key}" in header.arrays:
            raise TokcompError(f"{header.path}: cannot be cut into segments, {reason} ({architecture}.{key})")
    if header.metadata.get(f"{architecture}.attention.causal") is False:
        raise TokcompError(f"{header.path}: cannot be cut into segments, its attention is not causal")


def _check_arrays(header: GgufHeader, architecture: str, depth: int) -> None:
    """Every array with an entry a layer must be known as such, and have one for every layer."""
    for key, count in header.arrays.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _OF_THE_WHOLE:
            continue
        if name in _PER_LAYER:
            if count != depth:
                raise TokcompError(f"{header.path}: {key} has {count} entries for {depth} layers; convert it again")
            header.numbers(key)  # refuses others
        elif count == depth:
            raise TokcompError(
                f"{header.path}: cannot be cut into segments, it is not known whether the {count} entries of {key} "
                "stand for its layers"
            )


def _integer(header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    return value if isinstance(value, int) else default


def _gather(files: Sequence[Path], depth: int) -> dict[str, Tensor]:
    """All tensors of a model, every layer's among them."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, info in read_header(path).tensors.items():
            if name in tensors:
                raise TokcompError(f"{path}: tensor {name!r} stands in another part, too; download the model again")
            if info.n_bytes is None:
                raise TokcompError(f"{path}: {name!r} has {info.type_name}, unknown to gguf; update the gguf package")
            tensors[name] = Tensor(name, info.shape, info.type_id, Piece(path, info.offset, info.n_bytes))
    layers = {int(match[1]) for name in tensors if (match := _LAYER_TENSOR.fullmatch(name))}
    if layers != set(range(depth)):
        raise TokcompError(f"{files[0]}: holds {len(layers)} layers instead of {depth}; download or convert it again")
    if _TABLE not in tensors or len(tensors[_TABLE].shape) != 2 or tensors[_TABLE].shape[0] > _MOST_WIDTH:
        raise TokcompError(f"{files[0]}: has no {_TABLE} matrix of a usual size, so it is not a language model")
    return tensors
