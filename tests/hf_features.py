"""What transformers makes of a picture that needs no resizing: rows as they enter the language model.

Pixels are laid out here, not by transformers' image processors, which resize and pad.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hf_vlms import FAMILIES, Ids


def features(model: PreTrainedModel, family: str, picture: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Rows ``(n, width)`` of each tile of an RGB ``picture (height, width, 3)``, tiles in raster order.

    Families with tiles of one size take pictures of whole tiles, the others one tile of whole merged patches.
    Qwen3-VL's rows are followed by their deepstack slices; Pixtral's have a row break after each row of the grid but
    the last. LLaVA-NeXT's tiles are not packed: no line ends among them.
    """
    pixels = normalized(family, picture)
    with torch.no_grad():
        if family.startswith("qwen"):
            rows = _qwen(model, family, pixels)
        elif family == "lfm2vl":
            rows = _lfm2vl(model, pixels)
        elif family in ("pixtral", "mistral3"):
            rows = _pixtral(model, pixels)
        else:
            rows = _tiles(model, family, pixels)
    return [tile.numpy() for tile in rows]


def normalized(family: str, picture: NDArray[np.uint8]) -> torch.Tensor:
    """``(3, height, width) float32`` with the family's mean and deviation."""
    mean, deviation = (np.float32(FAMILIES[family].preprocessor[f"image_{name}"]) for name in ("mean", "std"))
    return torch.from_numpy((np.float32(picture) / 255 - mean) / deviation).permute(2, 0, 1)


def _tiles(model: PreTrainedModel, family: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    side = model.config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    _, height, width = pixels.shape
    tiles = pixels.reshape(3, height // side, side, width // side, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if family in ("idefics3", "smolvlm"):
        rows = torch.cat([part.flatten(0, -2) for part in model.model.get_image_features(tiles[None]).pooler_output])
    elif family.startswith("llava"):
        hidden = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-2]
        rows = model.model.multi_modal_projector(hidden[:, 1:]).flatten(0, 1)
    else:
        rows = model.model.get_image_features(tiles).pooler_output.flatten(0, 1)
    return list(rows.reshape(len(tiles), -1, rows.shape[-1]))


def _qwen(model: PreTrainedModel, family: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    patch, merge = model.config.vision_config.patch_size, model.config.vision_config.spatial_merge_size
    _, height, width = pixels.shape
    blocks = pixels.reshape(3, height // patch // merge, merge, patch, width // patch // merge, merge, patch)
    rows = blocks.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
    grid = torch.tensor([[1, height // patch, width // patch]])
    output = model.model.get_image_features(rows.flatten(5).flatten(0, 4).reshape(grid.prod(), -1), grid)
    slices = [output.pooler_output, *(output.deepstack_features if family == "qwen3vl" else [])]
    return [torch.cat([torch.cat(list(part)) for part in slices], 1)]


def _lfm2vl(model: PreTrainedModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    patch = model.config.vision_config.patch_size
    _, height, width = pixels.shape
    rows = pixels.reshape(3, height // patch, patch, width // patch, patch).permute(1, 3, 2, 4, 0).flatten(2)
    mask = torch.ones(1, rows.shape[0] * rows.shape[1], dtype=torch.long)
    output = model.model.get_image_features(rows.flatten(0, 1)[None], torch.tensor([rows.shape[:2]]), mask)
    return list(output.pooler_output)


def _pixtral(model: PreTrainedModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    config: Any = model.config
    unit = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    _, height, width = pixels.shape
    output = model.model.get_image_features(pixels[None], image_sizes=torch.tensor([[height, width]])).pooler_output
    grid = torch.cat(list(output)).reshape(height // unit, width // unit, -1)
    row_break = model.get_input_embeddings().weight[Ids().row_break].expand(len(grid), 1, -1)
    return [torch.cat([grid, row_break], 1).flatten(0, 1)[:-1]]
