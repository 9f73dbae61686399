"""One picture through a tower of published size with random weights: ours in fp32 and int8 beside llama.cpp's own.

    python benchmarks/tower.py [--shape llava-1.5-7b] [--rounds 10] [--threads 2]

All three run in one process on the same mmproj GGUF, in turn in every round; medians over the rounds that follow the
warm-up, and each one's ratio to llama.cpp's, round by round. All begin with the picture, which each cuts and resizes
itself, and end with the projector on all rows; times are by crop. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from edge_tokcomp.export.random_pairs import BENCH_SHAPES, cached_pair
from edge_tokcomp.export.tower_files import cached_tower
from edge_tokcomp.families import family_named
from edge_tokcomp.language.model import LanguageModel
from edge_tokcomp.language.mtmd import ImagePiece, MtmdEncoder
from edge_tokcomp.tower import Tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=BENCH_SHAPES, default="llava-1.5-7b")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    lm, mmproj = cached_pair(BENCH_SHAPES[options.shape])
    spec = cached_tower(mmproj, threads=options.threads).spec
    family, side = family_named(spec.family), spec.image_size
    height, width = side, side
    if spec.limits.longest_edge:  # SmolVLM enlarges what is not long: four tiles and an overview
        width = 4 * side
    elif spec.limits.pinpoints or spec.limits.max_tiles:  # of one tile llama.cpp makes something else
        height, width = 2 * side, 2 * side
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with (
        LanguageModel.open(lm) as model,
        MtmdEncoder(mmproj, model, threads=options.threads) as theirs,
    ):
        crops = sum(isinstance(piece, ImagePiece) for piece in theirs.encode(picture))
        if crops != len(family.preprocess(Image.fromarray(picture), spec).crops):
            raise SystemExit(
                f"llama.cpp cuts this picture into {crops} crops, we into others; their times do not compare"
            )
        arms: dict[str, Callable[[], object]] = {"llama.cpp": lambda: theirs.encode(picture)}
        for precision in ("fp32", "int8"):
            files = cached_tower(mmproj, precision, threads=options.threads)
            print(f"{precision}: {files.check}; left in fp32: {', '.join(files.left_in_fp32) or 'nothing'}")
            tower = Tower(files.directory, provider="cpu", threads=options.threads)
            arms[f"ours, {precision}"] = lambda tower=tower: [
                tower.project(tower.encode(crop[None]).rows(0))
                for crop in family.preprocess(Image.fromarray(picture), spec).crops
            ]
        samples: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(options.warm_up + options.rounds):
            for name, run in arms.items():
                started = time.perf_counter()
                run()
                if number >= options.warm_up:
                    samples[name].append((time.perf_counter() - started) * 1e3 / crops)
    base = np.array(samples["llama.cpp"])
    print(f"\n{options.shape}, {width} x {height}, {options.threads} threads of {platform.machine()}")
    print("\n| tower | ms a crop | times as fast as llama.cpp |\n|---|---|---|")
    for name, times in samples.items():
        ratio = base / np.array(times)
        print(f"| {name} | {np.median(times):.0f} | {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) |")


if __name__ == "__main__":
    main()
