"""Logits of a prompt with pictures by libmtmd's own helper, in a llama.cpp context made here; nothing of ours but the
open model."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from numpy.typing import NDArray

from edge_tokcomp.language.gguf_header import read_header
from edge_tokcomp.language.model import LanguageModel

Floats = NDArray[np.float32]
Picture = NDArray[np.uint8]
CONTEXT = 4096


def helper_logits(model: LanguageModel, mmproj: Path, texts: Sequence[str], pictures: Sequence[Picture]) -> Floats:
    """``(n_vocab,)`` of the last token of ``texts``, one more than ``pictures``, which stand between them."""
    context = new_context(model)
    encoding = mtmd.mtmd_context_params_default()
    encoding.use_gpu, encoding.n_threads, encoding.warmup = False, 1, False
    tower = mtmd.mtmd_init_from_file(os.fsencode(mmproj), model.handle.pointer, encoding)
    bitmaps = []
    for picture in pictures:
        pixels = np.ascontiguousarray(picture).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmaps.append(mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], pixels))
    chunks = mtmd.mtmd_input_chunks_init()
    prompt = mtmd.mtmd_default_marker().join(text.encode() for text in texts)
    text = mtmd.mtmd_input_text(prompt, len(prompt), False, True)
    assert mtmd.mtmd_tokenize(tower, chunks, text, (ctypes.c_void_p * len(bitmaps))(*bitmaps), len(bitmaps)) == 0
    past = llama.llama_pos()
    if "v.token_embd.img_break" in read_header(mmproj).tensors:
        _decode_mended(tower, context, chunks, mmproj, past)
    elif model.architecture == "cogvlm":
        _decode_last_alone(tower, context, chunks, past)
    else:
        assert mtmd.mtmd_helper_eval_chunks(tower, context, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
    logits = last_logits(model, context)
    mtmd.mtmd_input_chunks_free(chunks)
    for bitmap in bitmaps:
        mtmd.mtmd_bitmap_free(bitmap)
    mtmd.mtmd_free(tower)
    llama.llama_free(context)
    return logits


def token_logits(model: LanguageModel, tokens: Sequence[int]) -> Floats:
    """``(n, n_vocab)``, of each of ``tokens``, fed to llama.cpp one by one."""
    context, found = new_context(model), []
    for token in tokens:
        _decode_token(context, token)
        found.append(last_logits(model, context))
    llama.llama_free(context)
    return np.stack(found)


def new_context(model: LanguageModel) -> Any:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = CONTEXT, 512, 512, 1
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
    parameters.flash_attn_type, parameters.swa_full = 0, True
    return llama.llama_init_from_model(model.handle.pointer, parameters)


def last_logits(model: LanguageModel, context: Any) -> Floats:
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (model.n_vocab,)).copy()


def _decode_token(context: Any, token: int) -> None:
    held = (llama.llama_token * 1)(token)  # a batch does not keep its memory
    assert llama.llama_decode(context, llama.llama_batch_get_one(held, 1)) == 0


def _decode_last_alone(tower: Any, context: Any, chunks: Any, past: Any) -> None:
    """As ``mtmd_helper_eval_chunks``, the last token by itself: of several, llama.cpp gives the first one's logits for
    the last's, because CogVLM's graph computes those of all."""
    *earlier, last = (mtmd.mtmd_input_chunks_get(chunks, n) for n in range(mtmd.mtmd_input_chunks_size(chunks)))
    for chunk in earlier:
        place = ctypes.byref(past)
        assert mtmd.mtmd_helper_eval_chunk_single(tower, context, chunk, past, 0, 512, False, place) == 0
    count = ctypes.c_size_t()
    tokens = mtmd.mtmd_input_chunk_get_tokens_text(last, ctypes.byref(count))
    for token in tokens[: count.value]:
        _decode_token(context, token)


def _decode_mended(tower: Any, context: Any, chunks: Any, mmproj: Path, past: Any) -> None:
    """As ``mtmd_helper_eval_chunks``, with Pixtral's row ends as the file has them: now and then libmtmd's are not
    finite, because it makes them of memory that nobody has written."""
    header = read_header(mmproj)
    tensor = header.tensors["v.token_embd.img_break"]
    row_break = np.fromfile(mmproj, np.float32, tensor.shape[0], offset=tensor.offset)
    count = mtmd.mtmd_input_chunks_size(chunks)
    for number in range(count):
        chunk = mtmd.mtmd_input_chunks_get(chunks, number)
        place, last = ctypes.byref(past), number == count - 1
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            assert mtmd.mtmd_helper_eval_chunk_single(tower, context, chunk, past, 0, 512, last, place) == 0
            continue
        assert mtmd.mtmd_encode_chunk(tower, chunk) == 0
        output = mtmd.mtmd_get_output_embd(tower)
        rows = np.ctypeslib.as_array(output, (mtmd.mtmd_input_chunk_get_n_tokens(chunk), len(row_break)))
        rows[~np.isfinite(rows).all(axis=1)] = row_break
        callback = mtmd.mtmd_helper_post_decode_callback()
        assert (
            mtmd.mtmd_helper_decode_image_chunk(tower, context, chunk, output, past, 0, 512, place, callback, None) == 0
        )
