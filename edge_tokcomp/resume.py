"""What earlier runs left in an output file, and what of it need not be done again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ImageError, UsageError
from .images import read_bytes
from .records import Earlier, Record, read_earlier
from .sources import Source


@dataclass(frozen=True)
class Done:
    """What an earlier run left.

    ``captions`` by (file hash, parameters); ``copies``: the ids of those that stand there under several;
    ``latest``: the last row of each id; ``last`` caption of a file hash.
    """

    captions: dict[tuple[str, str], Earlier] = field(default_factory=dict)
    copies: frozenset[tuple[str, str, str]] = frozenset()
    latest: dict[str, Earlier] = field(default_factory=dict)
    last: dict[str, Earlier] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Done:
        """From an output file; empty without one. Raises ``TokcompError`` if the file holds something else."""
        captions: dict[tuple[str, str], Earlier] = {}
        latest: dict[str, Earlier] = {}
        copies, last = set(), {}
        for earlier in read_earlier(path) if path else ():
            latest[earlier.id] = earlier
            if not earlier.ok:
                continue
            key = earlier.sha256, earlier.params_hash
            if key in captions:
                copies |= {(captions[key].id, *key), (earlier.id, *key)}
                if earlier.information is None:  # a copy has no score of its own
                    earlier = earlier._replace(information=captions[key].information)
            captions[key] = last[earlier.sha256] = earlier
        return cls(captions, frozenset(copies), latest, last)

    def has(self, name: str, sha256: str, parameters: str) -> bool:
        """Whether the picture of that id, with those bytes, is done with those parameters.

        It is not when its last row is an error: whoever reads the file would take it for failed.
        """
        latest = self.latest.get(name)
        if latest is not None and not latest.ok:
            return False
        earlier = self.captions.get((sha256, parameters))
        return earlier is not None and (earlier.id == name or (name, sha256, parameters) in self.copies)

    def says(self, record: Record) -> bool:
        """Whether an error row is already the last word on its picture."""
        last = self.latest.get(record.id)
        return last is not None and (last.ok, last.sha256, last.error) == (False, record.sha256, record.error)


def check_ids(sources: Sequence[Source], done: Done) -> None:
    """Raise ``UsageError`` when a picture has the id of another one that was captioned into the same file.

    An id names a picture within a folder only. The same bytes in another folder are no other picture: folders are
    moved, and mounted elsewhere.
    """
    for source in sources:
        earlier = done.latest.get(source.id)
        if earlier is None or not earlier.ok or earlier.root == source.root:
            continue
        try:
            digest = hashlib.sha256(read_bytes(source.path)).hexdigest()
        except ImageError:
            continue
        if digest != earlier.sha256:
            raise UsageError(
                f"--out holds {source.id} of the folder {earlier.root}, not the one of {source.root}; use another --out"
            )
