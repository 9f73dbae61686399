"""Rows that llama.cpp's own libmtmd makes of a picture, in a process of its own: it ends the process on many errors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def rows_of(lm: Path, mmproj: Path, picture: NDArray[np.uint8], width: int) -> list[NDArray[np.float32]]:
    """Rows ``(n, width)`` of every tile of an RGB ``picture``, in the order in which they enter the prompt."""
    source, target = mmproj.with_suffix(".picture.npy"), mmproj.with_suffix(".rows.npz")
    np.save(source, picture)
    command = [sys.executable, __file__, str(lm), str(mmproj), str(source), str(target), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"libmtmd failed ({done.returncode}): {done.stderr[-2000:]}")
    with np.load(target) as tiles:
        return [tiles[str(number)] for number in range(len(tiles))]


def _encode(lm: Path, mmproj: Path, picture: NDArray[np.uint8], width: int) -> list[NDArray[np.float32]]:
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(os.fsencode(lm), llama.llama_model_default_params())
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu, parameters.n_threads, parameters.warmup = False, 1, False
    context = mtmd.mtmd_init_from_file(os.fsencode(mmproj), model, parameters)
    pixels = np.ascontiguousarray(picture).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], pixels)
    chunks = mtmd.mtmd_input_chunks_init()
    if not (model and context and bitmap and chunks):
        raise SystemExit("llama.cpp cannot load the model, the projector or the picture")
    marker = mtmd.mtmd_default_marker()
    text = mtmd.mtmd_input_text(marker, len(marker), False, True)
    if mtmd.mtmd_tokenize(context, chunks, text, (ctypes.c_void_p * 1)(bitmap), 1):
        raise SystemExit("libmtmd cannot prepare the picture")
    tiles = []
    for number in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, number)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            continue
        if mtmd.mtmd_encode_chunk(context, chunk):
            raise SystemExit(f"libmtmd cannot encode chunk {number}")
        count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        tiles.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (count, width)).copy())
    return tiles


if __name__ == "__main__":
    lm, mmproj, source, target = map(Path, sys.argv[1:5])
    encoded = _encode(lm, mmproj, np.load(source), int(sys.argv[5]))
    np.savez(target, **{str(number): tile for number, tile in enumerate(encoded)})
