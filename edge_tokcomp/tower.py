"""The vision tower on ONNX Runtime: pixels to features, kept rows to language-model width.

Runs a directory holding ``tower.onnx`` and ``projector.onnx``, as the exporter writes it. They are two graphs so that
only the rows a method keeps pass through the projector. ``attention.onnx``, where it is, is the tower with a block's
attention and keys among its outputs, over the same weights: ONNX Runtime computes all outputs, whichever are asked for.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import TokcompError, UsageError
from .received import received_attention, squares
from .tokens import Ints
from .variant import Merge, shrinking, spread

if TYPE_CHECKING:
    import onnxruntime

Floats = NDArray[np.float32]
Provider = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
"""fp16 stores and computes everything in 16 bits: for GPUs. int8 stores and multiplies the blocks' matrices in 8 bits,
quantising activations as they come: for CPUs."""

GraphName = Literal["tower", "attention"]
"""Without a block's attention and keys, or with them."""

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    # Boards share memory with the GPU: take what is needed, not the next power of two.
    "arena_extend_strategy": "kSameAsRequested",
    # The exhaustive search is run again for every batch size, and costs seconds each time.
    "cudnn_conv_algo_search": "HEURISTIC",
}


@dataclass(frozen=True, eq=False)
class Patches:
    """``queries``, ``keys (B, P, D) float32`` of all ``heads`` of a block, a row a patch of ``grid``; ``side``: patches
    a side of one token."""

    queries: Floats
    keys: Floats
    heads: int
    grid: tuple[int, int]
    side: int

    def received(self, crop: int) -> Floats:
        """``(heads, tokens) float32``: the attention that each token's patches receive from all patches of a crop."""
        attention = received_attention(self.queries[crop], self.keys[crop], self.heads)
        return np.asarray(squares(attention, self.grid, self.side).sum(axis=-1))


@dataclass(frozen=True, eq=False)
class TowerOutput:
    """What the tower says of B crops.

    ``features (B, rows, D) float32``: a row a token, CLS row first where the tower returns one.
    ``cls_attention (B, heads, rows) float32``: the softmax weights of a block's CLS query, None without a CLS.
    ``keys (B, rows, Dk) float32``: that block's attention keys averaged over heads.
    ``owners``: for each merge, ``(B, N) int64``: the cell of the grid after it, in raster order, that each of the
    picture's N patches is in.
    ``patches``: what attention between patches is taken of, where there is no CLS.
    ``deepstack (B, rows, E) float32``: features of blocks on the way, which only the projector takes; None where the
    model has no such. Attention and keys are None where the graph describes no block.
    """

    features: Floats
    cls_attention: Floats | None
    keys: Floats | None = None
    owners: tuple[Ints, ...] = ()
    deepstack: Floats | None = None
    patches: Patches | None = None

    def rows(self, crop: int) -> Floats:
        """``(rows, D + E)``: what the projector takes of one crop."""
        if self.deepstack is None:
            return np.asarray(self.features[crop])
        return np.concatenate([self.features[crop], self.deepstack[crop]], axis=1)

    def crop(self, number: int) -> TowerOutput:
        """The same of one crop."""
        one = slice(number, number + 1)
        attention, keys, deepstack = (
            None if array is None else array[one] for array in (self.cls_attention, self.keys, self.deepstack)
        )
        patches = (
            None
            if self.patches is None
            else replace(self.patches, queries=self.patches.queries[one], keys=self.patches.keys[one])
        )
        return TowerOutput(self.features[one], attention, keys, tuple(o[one] for o in self.owners), deepstack, patches)

    @property
    def owner(self) -> Ints | None:
        """``(B, N) int64``: the row, CLS not counted, that each patch is in at the end; None where nothing merges."""
        return self.owners[-1] if self.owners else None


class Tower:
    """An exported tower, loaded: its ``graph`` of that name.

    ``provider``: where to run; ``auto`` takes CUDA if it starts, else the CPU, and ``provider_reason`` says which and
    why. ``threads``: CPU threads of each call. The shapes it works with are ``image_size (H, W)``, pixels of the
    pictures it was made for, ``unit``, what other sides are multiples of, ``width`` (D) and ``language_width`` (d).
    ``levels``: widths of its deepstack features. ``class_token``: whether it has a CLS.
    ``separator (d,) float32``: what stands between rows of tokens, where the model has such. Raises ``TokcompError``
    when the directory holds no tower, ONNX Runtime is not installed, or the provider asked for does not start; it never
    falls back from one that was asked for.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        provider: Provider = "auto",
        threads: int,
        graph: GraphName = "tower",
    ) -> None:
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self.directory = Path(directory)
        runtime = _import_runtime()
        self.provider, self.provider_reason = _choose(runtime, provider)
        self._graph = graph
        paths = [self.directory / f"{name}.onnx" for name in (graph, "projector")]
        sessions = [_session(runtime, path, self.provider, threads) for path in paths]
        if not all(_runs_on(session, self.provider) for session in sessions):
            if provider == "cuda":
                raise TokcompError(
                    "provider cuda does not start here; check the NVIDIA driver, CUDA and cuDNN, or use provider cpu"
                )
            self.provider, self.provider_reason = "cpu", "cpu: CUDA is installed but does not start on this machine"
            sessions = [
                session if _runs_on(session, "cpu") else _session(runtime, path, "cpu", threads)
                for path, session in zip(paths, sessions, strict=True)
            ]
        self._tower, self._projector = sessions
        outputs = [output.name for output in self._tower.get_outputs()]
        self.merging = "owners" in outputs
        try:
            properties = self._tower.get_modelmeta().custom_metadata_map
            side, self.unit, self._patch, heads = (
                int(properties[n]) for n in ("image_size", "unit", "patch_size", "heads")
            )
            self.image_size: tuple[int, int] = side, side
            self._window = int(properties["window"]) or None
            self._blocks = [taken.shape[0] for taken in self._tower.get_inputs() if taken.name == "merges"]
            self.width: int = self._tower.get_outputs()[outputs.index("features")].shape[2]
            self.language_width: int = self._projector.get_outputs()[0].shape[1]
            self._taken: int = self._projector.get_inputs()[0].shape[1]
            if not 1 <= self._patch <= self.unit <= side or self.unit % self._patch or heads < 1:
                raise ValueError(f"pictures of {side}, patches of {self._patch}, units of {self.unit}, heads {heads}")
            stacked: int = sum(o.shape[2] for o in self._tower.get_outputs() if o.name == "deepstack")
            if self.width < 1 or self._taken != self.width + stacked or stacked % self.width:
                raise ValueError(f"rows of {self.width} and {self._taken}")
            self.levels = stacked // self.width
            self._heads, self.class_token = heads, {"True": True, "False": False}[properties["class_token"]]
            self.separator = _separator(self.directory / "separator.npy", self.language_width)
        except (ValueError, TypeError, IndexError, KeyError, OSError) as fault:
            raise TokcompError(
                f"{self.directory}: its files are no tower and projector ({fault!r}); export the tower again"
            ) from fault

    def encode(self, pixels: Floats, merges: Sequence[Merge] = ()) -> TowerOutput:
        """Run the tower on ``pixels (B, 3, H, W) float32``, normalised; any B.

        H and W are ``image_size`` or other multiples of ``unit``. ``merges``: what is merged on the way, where the
        graph does that (``merging``).
        Raises ``TokcompError`` when ONNX Runtime fails, most often for want of memory.
        """
        if (
            pixels.dtype != np.float32
            or pixels.ndim != 4
            or pixels.shape[1] != 3
            or not len(pixels)
            or not all(self._fits(axis, length) for axis, length in enumerate(pixels.shape[2:]))
        ):
            sides = f"n*{self.unit}, n*{self.unit}"
            raise ValueError(f"pixels must be (B, 3, {sides}) float32, got {pixels.shape} {pixels.dtype}")
        grid = pixels.shape[2] // self._patch, pixels.shape[3] // self._patch
        inputs: dict[str, NDArray[Any]] = {"pixels": pixels}
        if self.merging:
            inputs |= self._pairs(merges, grid)
        elif merges:
            raise ValueError("this graph merges nothing")
        names = [output.name for output in self._tower.get_outputs()]
        found = dict(zip(names, self._run(self._graph, self._tower, names, inputs), strict=True))
        keys, patches = found.get("keys"), None
        side = self.unit // self._patch
        *_, (down, across) = shrinking(merges, grid, self._window)
        grid = sum(down), sum(across)
        if keys is not None and "queries" in found:
            patches = Patches(found["queries"], keys, self._heads, grid, side)
        if keys is not None:
            keys = keys.reshape(*keys.shape[:2], self._heads, -1).mean(axis=2)
            if side > 1:
                keys = squares(np.moveaxis(keys, 1, 2), grid, side).mean(axis=-1).swapaxes(1, 2)
        return TowerOutput(
            found["features"], found.get("cls_attention"), keys, tuple(found.get("owners", ())),
            found.get("deepstack"), patches,
        )  # fmt: skip

    def _pairs(self, merges: Sequence[Merge], grid: tuple[int, int]) -> dict[str, NDArray[np.int64]]:
        """What the graph takes for ``merges`` of a ``grid`` of patches."""
        (blocks,) = self._blocks
        after = [merge.block for merge in merges]
        if max(after, default=0) > blocks - 2:
            raise ValueError(f"merges after blocks {after} of {blocks}")
        before = list(shrinking(merges, grid, self._window))
        across = [spread(merge.rows, pieces) for merge, (_, pieces) in zip(merges, before, strict=False)]
        down = [spread(merge.columns, pieces) for merge, (pieces, _) in zip(merges, before, strict=False)]
        shapes = [(len(merges), len(pieces)) for pieces in before[0]]
        return {
            "merges": np.bincount(np.array(after, np.int64), minlength=blocks).astype(np.int64),
            "pairs_down": np.array(down, np.int64).reshape(shapes[0]),
            "pairs_across": np.array(across, np.int64).reshape(shapes[1]),
        }

    def _fits(self, axis: int, length: int) -> bool:
        return length == self.image_size[axis] or (length > 0 and length % self.unit == 0)

    def project(self, rows: Floats) -> Floats:
        """``rows (n, D) float32``, deepstack features beside them, to ``(n, d) float32``; any n.

        Raises ``TokcompError`` when ONNX Runtime fails, and for a row that comes out with NaN or infinity.
        """
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != self._taken:
            raise ValueError(f"rows must be (n, {self._taken}) float32, got {rows.shape} {rows.dtype}")
        embeddings: Floats = self._run("projector", self._projector, ["embeddings"], {"rows": rows})[0]
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            raise TokcompError(
                f"projector, row {int(np.argmin(finite))} of {len(rows)}: not finite (NaN or infinity); "
                "check the mmproj file and the tower's precision"
            )
        return embeddings

    def _run(
        self, name: str, session: onnxruntime.InferenceSession, outputs: list[str], inputs: dict[str, NDArray[Any]]
    ) -> list[Any]:
        try:
            results: list[Any] = session.run(outputs, inputs)
        except Exception as fault:  # ONNX Runtime's exceptions share no base but this.
            instead = "use provider cpu" if self.provider == "cuda" else "export the tower again"
            raise TokcompError(
                f"{self.directory / name}.onnx: ONNX Runtime fails on {self.provider} ({_first_line(fault)}); "
                f"free memory if that is short, or {instead}"
            ) from fault
        return results


def _separator(path: Path, width: int) -> Floats | None:
    """What is in ``path``, where it exists; raises ``ValueError`` for anything but a finite row of ``width``.

    The file may come from anywhere: size and header are held against what such a row's are, and no header is parsed.
    """
    if not path.is_file():
        return None
    wanted = io.BytesIO()
    kind = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    np.lib.format.write_array_header_1_0(wanted, {"descr": kind, "fortran_order": False, "shape": (width,)})
    header = wanted.getvalue()
    size = path.stat().st_size
    if size != len(header) + 4 * width:
        raise ValueError(f"a separator of {size} bytes for rows of {width}")
    stored = path.read_bytes()
    row = np.frombuffer(stored, np.float32, offset=len(header))
    if not stored.startswith(header) or row.shape != (width,) or not np.isfinite(row).all():
        raise ValueError("the separator is no finite row")
    return row


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as fault:
        raise TokcompError(
            "ONNX Runtime is not installed; pip install 'edge-tokcomp[cpu]', or 'edge-tokcomp[gpu]' for CUDA (not both)"
        ) from fault
    return onnxruntime


def _choose(runtime: Any, provider: str) -> tuple[str, str]:
    if provider not in get_args(Provider):
        raise UsageError(f"unknown provider {provider!r}; one of {', '.join(get_args(Provider))}")
    available = runtime.get_available_providers()
    if provider == "cpu":
        return "cpu", "cpu: asked for"
    if _CUDA in available:
        if hasattr(runtime, "preload_dlls"):
            # Finds CUDA and cuDNN where pip put them; JetPack's older builds find the system's by themselves.
            runtime.preload_dlls()
        return "cuda", "cuda: asked for" if provider == "cuda" else "cuda: available"
    if provider == "cuda":
        raise TokcompError(
            "the installed ONNX Runtime has no provider cuda; "
            "pip uninstall onnxruntime, then pip install 'edge-tokcomp[gpu]'"
        )
    return "cpu", "cpu: the installed ONNX Runtime has no CUDA"


def _session(runtime: Any, path: Path, provider: str, threads: int) -> onnxruntime.InferenceSession:
    """A session on ``provider``, or on the CPU where that does not start (``_runs_on``)."""
    if not path.is_file():
        raise TokcompError(f"{path}: no such file; name a directory that edge-tokcomp export wrote")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # What is an error is raised as well.
    # Threads that spin while they wait take the cores from llama.cpp's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [(_CUDA, _CUDA_OPTIONS), _CPU] if provider == "cuda" else [_CPU]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of a provider that did not start; our caller says so itself.
            return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as fault:  # ONNX Runtime's exceptions share no base but this.
        raise TokcompError(
            f"{path}: ONNX Runtime cannot load it ({_first_line(fault)}); export the tower again"
        ) from fault


def _runs_on(session: onnxruntime.InferenceSession, provider: str) -> bool:
    return bool(session.get_providers()[0] == (_CUDA if provider == "cuda" else _CPU))


def _first_line(fault: Exception) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0]
