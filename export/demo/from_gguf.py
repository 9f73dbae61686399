"""Go on training from the two files of a trained demo model.

    python -m edge_tokcomp.export.demo.from_gguf MODEL FOLDER

Writes ``checkpoint.pt``, at the start of the last stage, and ``vocabulary.model`` into FOLDER for ``train.py``. The
heads of the per-patch targets are in no GGUF: they are fitted anew on the frozen tower, to scenes of FOLDER's pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from edge_tokcomp.errors import TokcompError

from .dense import dense_loss, dense_targets, pixels_of
from .model import DemoVLM, LanguageShape, TowerShape
from .pool import Pool, draw_pool
from .rotary import to_halves
from .train import STAGES, write_checkpoint
from .vocabulary import write_pieces


def read_weights(model: DemoVLM, language: Path, mmproj: Path) -> None:
    """Load every weight of ``model`` but the heads' from the two GGUF files ``to_gguf.py`` writes."""
    heads = model.lm.shape.heads
    weights: dict[str, Tensor] = {}
    for path, prefix in ((language, "lm."), (mmproj, "")):
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(reversed(tensor.shape.tolist()))
            values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
            if prefix and ("attn_q." in tensor.name or "attn_k." in tensor.name):
                values = to_halves(values, heads)
            weights[f"{prefix}{tensor.name}"] = torch.from_numpy(values.copy())
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or any(not name.startswith("aid.") for name in missing):
        raise ValueError(f"{language}, {mmproj}: not the demo model; missing {missing}, unknown {unknown}")


def write_vocabulary(language: Path, path: Path) -> None:
    """Write the vocabulary in a language-model GGUF as a SentencePiece model."""
    fields = gguf.GGUFReader(language).fields
    columns = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    write_pieces(path, zip(*columns, strict=True))


def fit_heads(model: DemoVLM, pool: Pool, steps: int = 200, batch: int = 24) -> dict[str, float]:
    """Fit ``model.aid`` to what the tower gives; returns the accuracies of the last step."""
    rng = np.random.default_rng(5)
    seen: dict[str, float] = {}
    optimizer = torch.optim.AdamW(model.aid.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        images, owners, things = pool.batch(rng.integers(len(pool), size=batch).tolist())
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = model.v(pixels_of(images))
            loss, seen = dense_loss(model.aid, features, dense_targets(owners, things), whole=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="folder of demo-lm.gguf and demo-mmproj.gguf")
    parser.add_argument("folder", type=Path, help="folder to train in; its pool is drawn if it is not there")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        draw_pool(options.folder / "pool", options.threads)
        pool = Pool(options.folder / "pool")
    except TokcompError as fault:
        raise SystemExit(str(fault)) from fault
    language, mmproj = options.model / "demo-lm.gguf", options.model / "demo-mmproj.gguf"
    write_vocabulary(language, options.folder / "vocabulary.model")
    model = DemoVLM(TowerShape(), LanguageShape())
    read_weights(model, language, mmproj)
    print(fit_heads(model, pool))
    write_checkpoint(options.folder, model, len(pool), stage=len(STAGES) - 1, step=0, optimizers=[])


if __name__ == "__main__":
    main()
