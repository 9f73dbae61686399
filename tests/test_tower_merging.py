"""LUVC's merger inside the towers whose squares of patches become tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_tokcomp.cli import main
from edge_tokcomp.errors import UsageError
from edge_tokcomp.export.tower_files import cached_tower
from edge_tokcomp.methods import get_method
from edge_tokcomp.variant import Merge, TowerVariant
from family_proof import Proof, photo
from hf_mmproj import write_mmproj_of
from hf_vlms import build

NAMES = ("idefics3", "smolvlm", "internvl_qwen2", "gemma3", "llava_next")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_graph_merges_as_the_numpy_tower_does(tmp_path: Path, name: str, share: float, precision: str) -> None:
    mmproj = write_mmproj_of(build(name), name, tmp_path / "m.gguf")
    spec = cached_tower(mmproj, precision, tmp_path / "cache", threads=1).spec
    variant = get_method("luvc").variant(int(share * spec.patches), spec.grid, spec.blocks, spec.merge)
    files = cached_tower(mmproj, precision, tmp_path / "cache", variant=variant, threads=1)
    assert files.check.exact if precision == "fp32" else files.check.close
    rows, columns = variant.final_grid(spec.grid, spec.blocks, spec.merge)
    assert rows * columns <= share * spec.patches


@pytest.mark.parametrize("name", NAMES)
def test_fewer_tokens_come_out_of_every_crop_and_answers_come_of_them(name: str, tmp_path: Path) -> None:
    proof = Proof.make(name, tmp_path)
    picture = photo(90, 60)
    with proof.open() as vlm:
        whole = vlm.see(picture).tokens
    with proof.open(method="luvc", keep=0.5) as vlm:
        encoded = vlm.encode(picture)
        tokens = encoded.tokens
        assert tokens.layout.before == whole.layout.before
        assert len(tokens.layout.grids) == len(whole.layout.grids)
        assert len(encoded.plan) <= 0.75 * whole.layout.before
        assert tokens.attention is not None
        assert tokens.attention.shape[1] == len(tokens)
        assert tokens.keys is not None
        assert len(tokens.keys) == len(tokens)
        answer = vlm.answer(encoded, "what is this", max_tokens=3)
        assert answer.tokens_after == len(encoded.plan)
    picture.save(tmp_path / "a.png")
    files = ["--lm", str(proof.lm), "--mmproj", str(proof.mmproj), "--ctx", "1024"]
    drawn = ["--method", "luvc", "--keep", "0.5", "--out", str(tmp_path / "b.png")]
    assert main(["inspect", str(tmp_path / "a.png"), *files, *drawn]) == 0
    assert np.asarray(Image.open(tmp_path / "b.png")).std() > 0


def test_merges_that_leave_a_part_of_a_token_are_refused(tmp_path: Path) -> None:
    mmproj = write_mmproj_of(build("idefics3"), "idefics3", tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="leave 8 x 7 patches leave no whole tokens of 2 x 2"):
        cached_tower(mmproj, cache=tmp_path, threads=1, variant=TowerVariant(merges=(Merge(0, 1, 0),)))
