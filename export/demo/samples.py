"""Write the sample pictures that come with the demo model: scenes it was not trained on.

python -m edge_tokcomp.export.demo.samples OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from .scenes import draw_scene

SAMPLE_SEED = 4000
COUNT = 6


def write_samples(folder: Path) -> list[Path]:
    """``COUNT`` scenes of three things or more with digits of the test split, as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    seed = 0
    while len(written) < COUNT:
        scene = draw_scene((SAMPLE_SEED, seed), "test")
        seed += 1
        if len(scene.things) >= 3:
            path = folder / f"scene-{len(written) + 1}.jpg"
            Image.fromarray(scene.image).save(path, quality=95, subsampling=0)
            written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    for path in write_samples(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
