"""Names of a Hugging Face checkpoint's tensors, and what an mmproj GGUF calls them.

Spellings differ by who saved a checkpoint: ``vision_tower.vision_model.encoder…`` on the Hub,
``vision_tower.encoder…`` by transformers 5, either behind ``model.``; ``visual.…`` of Qwen-VL, ``vision_model.…`` of
SmolVLM and of OpenGVLab's InternVL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_Table = Sequence[tuple[str, str]]

_TOWER = r"(?:model\.)?(?:vision_tower|vision_model|visual)\.(?:vision_model\.)?"
_PROJECTOR = r"(?:model\.)?multi_modal_projector\."
_END = r"\.(weight|bias)"

_STEM: _Table = (
    (rf"(?:embeddings\.patch_embeddings?(?:\.projection)?|patch_conv|patch_embed\.proj){_END}", r"v.patch_embd.\1"),
    (r"embeddings\.position_embedding(?:s|\.weight)?|pos_embed\.weight", "v.position_embd.weight"),
    (r"embeddings\.(?:class_embedding|cls_token)", "v.class_embd"),
    (rf"(?:pre_layrnorm|ln_pre){_END}", r"v.pre_ln.\1"),
    (rf"(?:post_layernorm|merger\.(?:ln_q|norm)){_END}", r"v.post_ln.\1"),
    (rf"merger\.(?:mlp\.0|linear_fc1){_END}", r"mm.0.\1"),
    (rf"merger\.(?:mlp\.2|linear_fc2){_END}", r"mm.2.\1"),
)
_BLOCK: _Table = (
    (rf"(?:self_attn|attention)\.([qkv])_proj{_END}", r"attn_\2.\3"),
    (rf"attn\.qkv{_END}", r"attn_qkv.\2"),
    (rf"(?:self_attn\.out_proj|attention\.o_proj|attention\.projection_layer|attn\.proj){_END}", r"attn_out.\2"),
    (rf"(?:attention|attn)\.([qk])_norm{_END}", r"attn_\2_norm.\3"),
    (rf"(?:layer_norm1|norm1|layernorm_before|attention_norm){_END}", r"ln1.\2"),
    (rf"(?:layer_norm2|norm2|layernorm_after|ffn_norm){_END}", r"ln2.\2"),
    (rf"(?:mlp|feed_forward)\.(?:fc1|linear_fc1|up_proj){_END}", r"ffn_up.\2"),
    (rf"(?:mlp|feed_forward)\.(?:fc2|linear_fc2|down_proj){_END}", r"ffn_down.\2"),
    (rf"(?:mlp|feed_forward)\.gate_proj{_END}", r"ffn_gate.\2"),
    (r"(?:ls|lambda_)([12])", r"ls\2.weight"),
)
_TOWERS: _Table = (
    *((f"{_TOWER}(?:{pattern})", name) for pattern, name in _STEM),
    *((rf"{_TOWER}(?:(?:encoder|transformer)\.layers?|blocks)\.(\d+)\.(?:{pattern})", rf"v.blk.\1.{name}")
      for pattern, name in _BLOCK),
)  # fmt: skip


def _linears(first: str, second: str, norm: str = "") -> _Table:
    return (
        (rf"{_PROJECTOR}linear_1{_END}", rf"{first}.\1"), (rf"{_PROJECTOR}linear_2{_END}", rf"{second}.\1"),
        *[(rf"{_PROJECTOR}(?:layer_)?norm{_END}", rf"{norm}.\1")] * bool(norm),
    )  # fmt: skip


_EMBEDDING = r"(?:language_model\.model|model\.language_model|language_model)\.embed_tokens\.weight"
_PROJECTORS: Mapping[str, _Table] = {
    "mlp": (*_linears("mm.0", "mm.2"), (r"(?:model\.)?image_newline", "model.image_newline")),
    "idefics3": ((rf"(?:model\.)?connector\.modality_projection\.proj{_END}", r"mm.model.fc.\1"),),
    "gemma3": (
        (f"{_PROJECTOR}mm_input_projection_weight", "mm.input_projection.weight"),
        (rf"{_PROJECTOR}mm_soft_emb_norm\.weight", "mm.soft_emb_norm.weight"),
    ),
    "lfm2": _linears("mm.1", "mm.2", "mm.input_norm"),
    "internvl": (
        *_linears("mm.model.mlp.1", "mm.model.mlp.3", "mm.model.mlp.0"),
        (rf"mlp1\.([013]){_END}", r"mm.model.mlp.\1.\2"),
    ),
    "pixtral": (
        *_linears("mm.1", "mm.2", "mm.input_norm"),
        (rf"{_PROJECTOR}patch_merger\.merging_layer\.weight", "mm.patch_merger.weight"),
        (_EMBEDDING, "v.token_embd.img_break"),
    ),
}  # fmt: skip
"""Of what the towers' table does not have, by the projector's name in an mmproj."""


class Names:
    """The table of one model, from its ``metadata``."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        table = [*_TOWERS, *_PROJECTORS.get(metadata["clip.projector_type"], ())]
        levels = metadata.get("clip.vision.is_deepstack_layers", [])
        # The n-th merger is of the n-th of the blocks whose features go deeper down.
        for number, block in enumerate(block for block, on in enumerate(levels) if on):
            merger = rf"{_TOWER}deepstack_merger_list\.{number}\.(?:linear_)?(norm|fc1|fc2){_END}"
            table.append((merger, rf"v.deepstack.{block}.\1.\2"))
        self._table = [(re.compile(pattern), name) for pattern, name in table]

    def of(self, stored: str) -> str | None:
        """What an mmproj calls a tensor of the checkpoint; None for what is not of the tower."""
        for pattern, name in self._table:
            if match := pattern.fullmatch(stored):
                return match.expand(name)
        return None
