"""Attention that patches receive: what methods that need a CLS row's take where a tower has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_tokcomp.errors import TokcompError
from edge_tokcomp.methods import get_method
from edge_tokcomp.received import received_attention, squares
from edge_tokcomp.tokens import Layout, VisionTokens
from family_proof import Proof, error, photo


@pytest.mark.parametrize("count", [1, 7, 300, 600])
def test_it_is_the_mean_of_the_softmax_over_the_queries(count: int) -> None:
    random = np.random.default_rng(count)
    queries, keys = (random.standard_normal((count, 24), dtype=np.float32) for _ in range(2))
    split = [torch.from_numpy(x).reshape(count, 3, 8).transpose(0, 1) for x in (queries, keys)]
    wanted = torch.softmax(split[0] @ split[1].transpose(1, 2) / 8**0.5, dim=-1).mean(dim=1)
    found = received_attention(queries, keys, 3)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_squares_hold_the_patches_of_each_token() -> None:
    numbered = np.arange(4 * 6, dtype=np.float32)
    found = squares(numbered, (4, 6), 2)
    assert found.shape == (6, 4)
    assert found[0].tolist() == [0, 1, 6, 7]
    assert found[4].tolist() == [14, 15, 20, 21]


@pytest.mark.parametrize("name", ["qwen2vl", "smolvlm"])
def test_it_is_what_the_last_block_of_transformers_attends_to(name: str, tmp_path: Path) -> None:
    proof = Proof.make(name, tmp_path)
    softmax, weights = torch.nn.functional.softmax, []

    def noted(*args: object, **options: object) -> torch.Tensor:
        weights.append(softmax(*args, **options))  # type: ignore[arg-type]
        return weights[-1]

    asked = proof.asked([photo(168, 140)], "q")
    given = {key: asked[key] for key in ("pixel_values", "image_grid_thw", "pixel_attention_mask") if key in asked}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", noted)
        proof.model.get_image_features(**given)
    with proof.open(method="prunesid") as vlm:
        tokens = vlm.see(photo(168, 140)).tokens
    assert tokens.cls_attention is None
    received = weights[-1].numpy().mean(axis=2)  # (crops, heads, P)
    if name == "qwen2vl":  # the four patches of a token stand together
        wanted = received[0].reshape(received.shape[1], -1, 4).sum(-1)
    else:
        side = int(received.shape[2] ** 0.5)
        wanted = np.concatenate([squares(crop, (side, side), proof.spec.merge).sum(-1) for crop in received], axis=1)
    assert error(tokens.attention, wanted) <= 1e-4


def test_methods_that_need_attention_take_it_and_others_do_not_pay_for_it() -> None:
    random = np.random.default_rng(0)
    calls: list[int] = []

    def received() -> np.ndarray:
        calls.append(1)
        return np.abs(random.standard_normal((2, 36), np.float32))

    tokens = VisionTokens(random.standard_normal((36, 16), np.float32), Layout.of_grids((6, 6)), received=received)
    for name in ("mosaic", "divprune", "uniform"):
        get_method(name).compress(tokens, 9)
    assert not calls
    for name in ("prunesid", "scope"):
        assert len(get_method(name).compress(tokens, 9)) == 9
    assert calls == [1]
    with pytest.raises(TokcompError, match="prunesid needs the attention of the vision tower"):
        get_method("prunesid").compress(VisionTokens(tokens.features, tokens.layout), 9)
