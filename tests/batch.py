"""Running the batch job in tests, as the command does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_tokcomp.captioning import Summary, caption_all
from edge_tokcomp.parameters import Parameters
from edge_tokcomp.records import Csv, JsonLines, Record
from edge_tokcomp.resume import Done
from edge_tokcomp.sources import find_sources
from edge_tokcomp.vlm import VLM

PARAMETERS = Parameters("what is this", max_tokens=6)


class Collected:
    """A sink that keeps its records."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


class Told:
    """A progress that notes what it is told, and calls ``then`` after the first picture."""

    def __init__(self, then: Any = None) -> None:
        self.seen: list[tuple[str, str, bool]] = []
        self.counts: list[int] = []
        self.then = then

    def scored(self, count: int) -> None:
        self.counts.append(count)

    def done(self, record: Record, skipped: bool) -> None:
        self.seen.append((record.id, record.status, skipped))
        if self.then and len(self.seen) == 1:
            self.then()


def run(vlm: VLM, folder: Path, **options: Any) -> tuple[Summary, list[Record]]:
    sink = Collected()
    parameters = options.pop("parameters", PARAMETERS)
    return caption_all(vlm, find_sources([str(folder)]), sink, parameters, **options), sink.records


def into(vlm: VLM, folder: Path, out: Path, **options: Any) -> Summary:
    """As the command does it: what ``out`` holds is not done again."""
    parameters = options.pop("parameters", PARAMETERS)
    sink = (Csv if out.suffix == ".csv" else JsonLines)(out)
    try:
        return caption_all(vlm, find_sources([str(folder)]), sink, parameters, done=Done.read(out), **options)
    finally:
        sink.close()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
