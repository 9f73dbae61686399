"""Write a trained demo model as the two files a llama.cpp user brings.

    python -m edge_tokcomp.export.demo.to_gguf FOLDER OUT

``demo-lm.gguf``: architecture llama, Q8_0, SentencePiece vocabulary, chat template. ``demo-mmproj.gguf``: projector
type mlp, F16, in LLaVA-1.5's layout (the blocks in the file are those that run; the last one's output is the feature).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from numpy.typing import NDArray

from .model import PATCH, DemoVLM, LanguageShape, TowerShape
from .rotary import to_pairs
from .scenes import SIDE
from .vocabulary import BOS, CHAT_TEMPLATE, EOS, UNKNOWN, Vocabulary


def write_language_model(path: Path, model: DemoVLM, vocabulary: Vocabulary, quant: Quant) -> None:
    """Write ``model.lm``; matrices in ``quant``, norms in F32."""
    shape = model.lm.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("edge-tokcomp demo")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(len(model.lm.token_embd.weight))
    _add_vocabulary(writer, vocabulary)
    for name, tensor in model.lm.state_dict().items():
        values = tensor.float().numpy()
        if "attn_q." in name or "attn_k." in name:
            values = to_pairs(values, shape.heads)
        _add(writer, name, values, quant if values.ndim == 2 else Quant.F32)
    _finish(writer)


def write_mmproj(path: Path, model: DemoVLM, shape: TowerShape) -> None:
    """Write ``model.v`` and ``model.mm``; matrices in F16, vectors in F32."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name("edge-tokcomp demo")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    writer.add_uint32("clip.vision.image_size", SIDE)
    writer.add_uint32("clip.vision.patch_size", PATCH)
    writer.add_uint32("clip.vision.embedding_length", shape.width)
    writer.add_uint32("clip.vision.feed_forward_length", shape.hidden)
    writer.add_uint32("clip.vision.projection_dim", model.lm.shape.width)
    writer.add_uint32("clip.vision.block_count", shape.blocks)
    writer.add_uint32("clip.vision.attention.head_count", shape.heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", shape.eps)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    for prefix, module in (("v", model.v), ("mm", model.mm)):
        for name, tensor in module.state_dict().items():
            values = tensor.float().numpy()
            full = f"{prefix}.{name}"
            _add(writer, full, values, Quant.F16 if values.ndim >= 2 and "position" not in full else Quant.F32)
    _finish(writer)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    processor = vocabulary.processor
    pieces, scores, types = [], [], []
    for token in range(processor.vocab_size()):
        pieces.append(processor.id_to_piece(token).encode())
        scores.append(processor.get_score(token))
        if processor.is_unknown(token):
            types.append(gguf.TokenType.UNKNOWN)
        elif processor.is_control(token):
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.BYTE if processor.is_byte(token) else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], quant: Quant) -> None:
    data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), quant)
    writer.add_tensor(name, data, raw_dtype=quant)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where train.py left checkpoint.pt and vocabulary.model")
    parser.add_argument("out", type=Path, help="folder for the two GGUF files")
    options = parser.parse_args()
    model = DemoVLM(TowerShape(), LanguageShape())
    model.load_state_dict(torch.load(options.folder / "checkpoint.pt", weights_only=True)["model"])
    options.out.mkdir(parents=True, exist_ok=True)
    write_language_model(
        options.out / "demo-lm.gguf", model, Vocabulary(options.folder / "vocabulary.model"), Quant.Q8_0
    )
    write_mmproj(options.out / "demo-mmproj.gguf", model, TowerShape())


if __name__ == "__main__":
    main()
