"""Resident memory over a long batch: the bundled model captions N drawn scenes, memory read after every 50.

python benchmarks/batch_memory.py --images 500

Prints a line every 50 pictures and one JSON object last; exits 1 if memory grew by more than 2 % after the first 50.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

from PIL import Image

from edge_tokcomp.captioning import Parameters, caption_all
from edge_tokcomp.encoded_cache import EncodedCache
from edge_tokcomp.export.demo.scenes import draw_scene
from edge_tokcomp.records import JsonLines, Record
from edge_tokcomp.sources import find_sources
from edge_tokcomp.vlm import load

MEMORY_SEED = 6000


def resident_mib() -> float:
    """Memory of this process now, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """Reads the memory after every 50 pictures."""

    def __init__(self) -> None:
        self.seen = 0
        self.readings: list[float] = []

    def done(self, record: Record, skipped: bool) -> None:
        self.seen += 1
        if self.seen % 50 == 0:
            self.readings.append(round(resident_mib(), 1))
            print(f"{self.seen} images: {self.readings[-1]:.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--keep", type=int, default=64)
    options = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(options.images):
            Image.fromarray(draw_scene((MEMORY_SEED, index), "test").image).save(folder / f"{index:05}.png")
        with load(keep=options.keep, cache=EncodedCache(0)) as vlm:  # as the command does
            sink = JsonLines(folder / "out.jsonl")
            summary = caption_all(vlm, find_sources([name]), sink, Parameters(), progress=watch)
            sink.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(summary)
    print(json.dumps({"images": options.images, "resident_mib": watch.readings, "peak_mib": round(peak, 1)}))
    if watch.readings and watch.readings[-1] > 1.02 * watch.readings[0]:
        sys.exit("memory grew")


if __name__ == "__main__":
    main()
