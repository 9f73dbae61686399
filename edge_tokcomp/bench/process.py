"""The benchmark's side of a ``worker``: starts it, asks it, ends it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any

from ..errors import TokcompError
from .contenders import Setting


class Worker:
    """A contender in a process of its own; a context manager, which stops it at once where anything is raised.
    ``who``: ours or the baseline, by its name.

    Raises ``TokcompError`` with the contender's reason where it fails, here and in ``ask``.
    """

    def __init__(self, who: str, setting: Setting) -> None:
        self.who = who
        # libmtmd writes a line for every step of every picture.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, encoding="utf-8",
            # What is typed at the terminal interrupts the benchmark, which stops its workers itself.
            start_new_session=True,
        )  # fmt: skip
        try:
            self._say({"who": who, "setting": asdict(setting)})
        except BaseException:
            self.kill()
            raise

    def ask(self, do: str, pictures: Sequence[bytes] = (), **more: Any) -> dict[str, Any]:
        """Have it ``do`` something, and wait for the answer."""
        encoded = [base64.b64encode(picture).decode() for picture in pictures]
        return self._say({"do": do, "pictures": encoded, **more})

    def close(self) -> None:
        """End it, after what it is doing."""
        if self._process.stdin:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._process.stdout:
            self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fault is None:
            self.close()
        else:
            self.kill()

    def _say(self, request: dict[str, Any]) -> dict[str, Any]:
        line = ""
        if self._process.stdin and self._process.stdout:
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            self.close()
            raise TokcompError(f"{self.who}: its process ended (exit code {code}){last and f'; its last line: {last}'}")
        answer: dict[str, Any] = json.loads(line)
        if "fault" in answer:
            self.close()
            raise TokcompError(f"{self.who}: {answer['fault']}")
        return answer
