"""The one file that touches llama.cpp's C functions, through ``llama_cpp.llama_cpp`` (ctypes); tensors of a running
graph are ``readout``'s.

Owns every C object: ``close()`` is idempotent, a model outlives its contexts, and what is still open at interpreter
exit is freed in the right order. Checks here are only those that keep pointers valid; the rules about positions,
widths and sizes live in ``batches`` and ``segment``. llama.cpp's log lines go to the logger ``edge_tokcomp.llama``.

Not thread-safe: one object, one thread at a time (calls release the GIL).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from ..errors import TokcompError
from .input_batch import InputBatch, address
from .readout import Readout

Floats = NDArray[np.float32]
Int32s = NDArray[np.int32]

logger = logging.getLogger("edge_tokcomp.llama")

# ggml_log_level of ggml.h: 1 debug, 2 info, 3 warning, 4 error. Errors are warnings here: what matters is raised.
_WARNING, _ERROR, _CONTINUED = 3, 4, 5
_EXPECTED = ("dummy tokens", "grounding tasks", "try adding --image-min-tokens 1024", "issues/16842")
"""Ends of warnings about what is meant: the stand-in vocabulary of layer segments, and pictures smaller than libmtmd
would have them, with options of another program's."""
_KV_TYPES = {"f16": llama.GGML_TYPE_F16, "f32": llama.GGML_TYPE_F32}
_FLASH_ATTENTION = {None: -1, False: 0, True: 1}

Self = TypeVar("Self", bound="Handle")


class _Backend:
    """The process-wide state of llama.cpp: started once, on first use."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=32)
        self._lock = threading.Lock()
        self._callback: Any = None
        self._line, self._level = "", 0

    def start(self) -> None:
        with self._lock:
            if self._callback is not None:
                return
            # Without any handler Python would print warnings on stderr.
            logger.addHandler(logging.NullHandler())
            self._callback = llama.llama_log_callback(self._log)
            llama.llama_log_set(self._callback, None)
            # Finalizers run in reverse order of creation: the log stays ours until all handles are freed, and must
            # not reach into Python afterwards.
            weakref.finalize(self, llama.llama_log_set, llama.llama_log_callback(), None)
            llama.llama_backend_init()

    def _log(self, level: int, text: bytes, _user_data: object) -> None:
        if level != _CONTINUED:
            self._level = level
        self._line += text.decode("utf-8", errors="replace")
        if not self._line.endswith("\n"):
            return
        line, self._line = self._line.strip(), ""
        if self._level == _ERROR:
            self.errors.append(line)
        serious = self._level in (_WARNING, _ERROR) and not line.endswith(_EXPECTED)
        logger.log(logging.WARNING if serious else logging.DEBUG, "%s", line)

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Run a C call with the error list cleared, so that ``reason`` speaks of this call."""
        self.start()
        self.errors.clear()
        return call()

    @property
    def reason(self) -> str:
        """The first error llama.cpp logged during the last attempt."""
        return self.errors[0] if self.errors else "llama.cpp gave no reason"


_backend = _Backend()


class Handle:
    """A C object that is freed once: by ``close``, by garbage collection or at interpreter exit."""

    def __init__(self, pointer: Any, free: Callable[[Any], object], keep: object = None) -> None:
        self._pointer = pointer
        # `keep` rides in the finalizer so that a model cannot be collected before its contexts.
        self._finalizer = weakref.finalize(self, _free, free, pointer, keep)

    @property
    def pointer(self) -> Any:
        """The C pointer; raises ``ValueError`` once closed."""
        if not self._finalizer.alive:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._pointer

    def close(self) -> None:
        self._finalizer()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()


def _free(free: Callable[[Any], object], pointer: Any, _keep: object) -> None:
    free(pointer)


class Model(Handle):
    """Weights and vocabulary of one GGUF file."""

    def __init__(self, path: str | os.PathLike[str], *, gpu_layers: int = 0, use_mmap: bool = True) -> None:
        """``gpu_layers``: layers on the GPU, -1 for all. Raises ``TokcompError`` when llama.cpp refuses the file."""
        _backend.start()
        if gpu_layers and not llama.llama_supports_gpu_offload():
            raise TokcompError(
                f"gpu_layers {gpu_layers}: this llama-cpp-python was built without a GPU backend; "
                "reinstall it with CMAKE_ARGS=-DGGML_CUDA=on (or your GPU's), or use 0"
            )
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if use_mmap else llama.LLAMA_LOAD_MODE_NONE
        if b"AMX_INT8 = 1" in llama.llama_print_system_info():
            # GCC before 13 drops the AMX tile configuration that llama.cpp stores on the stack, and the process dies at
            # the first quantised product (ggml-org/llama.cpp issue 20824, pull request 26954).
            logger.info("weights are not repacked: llama.cpp was built with AMX, whose kernels crash in some builds")
            params.use_extra_bufts = False
        pointer = _backend.attempt(lambda: llama.llama_model_load_from_file(os.fsencode(path), params))
        if not pointer:
            raise TokcompError(f"{os.fspath(path)}: llama.cpp cannot load it ({_backend.reason})")
        super().__init__(pointer, llama.llama_model_free)
        self._vocab = llama.llama_model_get_vocab(pointer)
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()

    def close(self) -> None:
        """Free the model; contexts made from it are closed first."""
        for context in list(self._contexts):
            context.close()
        super().close()

    @property
    def vocab(self) -> Any:
        _ = self.pointer  # the vocabulary dies with the model
        return self._vocab

    def fact(self, name: str) -> int:
        """An integer of the model: ``n_embd``, ``n_embd_inp``, ``n_layer``, ``n_ctx_train``, ``rope_type``, ..."""
        return int(getattr(llama, f"llama_model_{name}")(self.pointer))

    def special_token(self, name: str) -> int | None:
        """``bos``, ``eos`` or ``eot``; ``None`` where the vocabulary has none."""
        token = int(getattr(llama, f"llama_vocab_{name}")(self.vocab))
        return None if token < 0 else token

    @property
    def n_vocab(self) -> int:
        return int(llama.llama_vocab_n_tokens(self.vocab))

    @property
    def has_tokenizer(self) -> bool:
        return int(llama.llama_vocab_type(self.vocab)) != int(llama.LLAMA_VOCAB_TYPE_NONE)

    def adds_bos(self) -> bool:
        return bool(llama.llama_vocab_get_add_bos(self.vocab))

    def is_end(self, token: int) -> bool:
        return bool(llama.llama_vocab_is_eog(self.vocab, token))

    def chat_template(self) -> str | None:
        text = llama.llama_model_chat_template(self.pointer, None)
        return text.decode("utf-8", errors="replace") if text else None

    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> Int32s:
        """Token ids of UTF-8 ``text``, ``(n,) int32``."""
        room = len(text) + 4
        while True:
            tokens = np.empty(room, np.int32)
            number = int(
                llama.llama_tokenize(
                    self.vocab, text, len(text), _pointer(tokens, llama.llama_token), room, add_special, parse_special
                )
            )
            if number >= 0:
                return tokens[:number]
            room = -number

    def detokenize(self, tokens: Int32s, special: bool) -> bytes:
        """UTF-8 text of ``tokens``; control tokens are written out when ``special``."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        return _text(
            lambda buffer, size: llama.llama_detokenize(
                self.vocab, _pointer(tokens, llama.llama_token), len(tokens), buffer, size, False, special
            )
        )

    def piece(self, token: int, special: bool) -> bytes:
        """The bytes a token adds to the text; may be part of a character."""
        return _text(lambda buffer, size: llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, special))


@dataclass(frozen=True)
class ContextOptions:
    """What a context is made with; llama.cpp may round ``n_ctx`` up and clips the batch sizes to it.

    ``n_batch``: rows a call, ``n_ubatch``: rows computed at once, ``n_outputs``: logit rows a call (a buffer of
    ``n_outputs * n_vocab * 4`` bytes is reserved). ``flash_attention``: ``None`` lets llama.cpp decide.
    """

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_sequences: int
    n_outputs: int
    threads: int
    threads_batch: int
    flash_attention: bool | None
    offload_kv: bool
    kv_type: Literal["f16", "f32"]


class Context(Handle):
    """One llama_context: a key-value cache shared by all sequences, and the compute buffers to fill it."""

    def __init__(self, model: Model, options: ContextOptions, readout: Readout | None = None) -> None:
        """``readout``: what is told of the nodes of the graph. Raises ``TokcompError`` when llama.cpp refuses, most
        often for want of memory."""
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = options.n_ctx, options.n_batch, options.n_ubatch
        params.n_seq_max, params.kv_unified = options.n_sequences, True
        params.n_outputs_max = options.n_outputs
        params.n_threads, params.n_threads_batch = options.threads, options.threads_batch
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.offload_kqv = options.offload_kv
        params.type_k = params.type_v = _KV_TYPES[options.kv_type]
        # A window-sized cache for sliding-window layers could neither be forked nor cut back.
        params.swa_full = True
        params.no_perf = True
        if readout:
            params.cb_eval, params.cb_eval_user_data = readout.callback, readout.user_data
        pointer = _backend.attempt(lambda: llama.llama_init_from_model(model.pointer, params))
        if not pointer:
            raise TokcompError(
                f"llama.cpp cannot make a context of n_ctx {options.n_ctx} and n_ubatch {options.n_ubatch} "
                f"({_backend.reason}); lower n_ctx"
            )
        super().__init__(pointer, llama.llama_free, keep=(model, readout))
        model._contexts.add(self)
        self._n_vocab = model.n_vocab
        self._memory = llama.llama_get_memory(pointer)
        self.n_ctx = int(llama.llama_n_ctx(pointer))
        self.n_batch = int(llama.llama_n_batch(pointer))
        self.n_ubatch = int(llama.llama_n_ubatch(pointer))
        self.has_memory = bool(self._memory)
        self._batch = InputBatch(self.n_batch)

    @property
    def memory(self) -> Any:
        _ = self.pointer  # the memory dies with the context
        return self._memory

    def decode(self, inputs: Floats | Int32s, positions: Int32s, sequences: Int32s, outputs: NDArray[np.bool_]) -> None:
        """Run rows ``(n, n_embd_inp)`` or tokens ``(n,)`` at ``positions`` ``(n,)`` or ``(4, n)``, of which only the
        first line counts for tokens; the other arrays are ``(n,)``.

        Raises ``TokcompError`` with llama.cpp's reason when it returns anything but success.
        """
        batch, pointer = self._batch, self.pointer
        _held = batch.fill(inputs, positions, sequences, outputs)
        code = int(_backend.attempt(lambda: llama.llama_decode(pointer, batch.value)))
        if code:
            raise TokcompError(f"llama.cpp cannot decode {len(inputs)} rows (code {code}: {_backend.reason})")

    def copy_logits(self, row: int, into: Floats) -> None:
        """Write the logits of a row of the last batch, flagged as output, into ``(n_vocab,) float32``."""
        pointer = llama.llama_get_logits_ith(self.pointer, row)
        if not pointer:
            raise ValueError(f"row {row} of the last batch has no logits")
        if into.shape != (self._n_vocab,) or into.dtype != np.float32 or not into.flags.c_contiguous:
            raise ValueError(f"logits go into ({self._n_vocab},) float32, not {into.shape} {into.dtype}")
        ctypes.memmove(address(into), pointer, into.nbytes)

    def set_threads(self, threads: int) -> None:
        llama.llama_set_n_threads(self.pointer, threads, threads)

    def set_causal(self, causal: bool) -> None:
        llama.llama_set_causal_attn(self.pointer, causal)

    def copy_sequence(self, source: int, target: int) -> None:
        """Let ``target`` share all rows of ``source``; no data is copied."""
        llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def remove(self, sequence: int, start: int = -1) -> bool:
        """Forget positions from ``start`` on (all by default); False when this memory cannot be cut there."""
        return bool(llama.llama_memory_seq_rm(self.memory, sequence, start, -1))

    def clear(self) -> None:
        llama.llama_memory_clear(self.memory, False)


class SamplerChain(Handle):
    """llama.cpp's samplers one after another, applied to logits that may come from any decoder."""

    def __init__(self, n_vocab: int) -> None:
        _backend.start()
        params = llama.llama_sampler_chain_default_params()
        params.no_perf = True
        super().__init__(llama.llama_sampler_chain_init(params), llama.llama_sampler_free)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.empty(n_vocab, np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))

    def add(self, name: str, *arguments: float) -> None:
        """Append ``llama_sampler_init_<name>(*arguments)``; the chain owns it."""
        llama.llama_sampler_chain_add(self.pointer, getattr(llama, f"llama_sampler_init_{name}")(*arguments))

    def add_grammar(self, vocab: Any, grammar: str) -> bool:
        """Append a grammar in GBNF with the rule ``root`` over the tokens of ``vocab``; False if it cannot be read."""
        start = _backend.attempt(lambda: llama.llama_sampler_init_grammar(vocab, grammar.encode(), b"root"))
        if start:
            llama.llama_sampler_chain_add(self.pointer, start)
        return bool(start)

    def sample(self, logits: Floats) -> int:
        """Pick a token from ``logits (n_vocab,)`` and tell the chain."""
        self._candidates["id"] = self._ids
        self._candidates["logit"] = logits
        self._candidates["p"] = 0.0
        array: Any = llama.llama_token_data_array()
        array.data = self._candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        array.size, array.selected, array.sorted = len(self._ids), -1, False
        llama.llama_sampler_apply(self.pointer, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise ValueError("the sampler chain selected no token; it must end in greedy or dist")
        # Samplers may replace the array, so the answer is read where the struct points now.
        token = int(array.data[array.selected].id)
        llama.llama_sampler_accept(self.pointer, token)
        return token


def _pointer(array: NDArray[Any], item: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(item))


def _text(write: Callable[[Any, int], Any]) -> bytes:
    """The bytes of a C call that writes into a buffer and answers a negative size when it is too small."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        written = int(write(buffer, size))
        if written >= 0:
            return buffer.raw[:written]
        size = -written
