"""One contender in a process of its own: requests come as JSON lines on stdin, answers leave so on stdout."""

from __future__ import annotations

import base64
import json
import os
import resource
import sys
from typing import Any

from ..errors import TokcompError
from .contenders import BASELINE, Baseline, Contender, Ours, Setting


def main() -> None:
    """Serve until stdin ends. The first line is the setting and who this is."""
    # What C libraries print on stdout must not come between our lines.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    first = json.loads(sys.stdin.readline())
    try:
        setting = Setting(**first["setting"])
        contender: Contender = Baseline(setting) if first["who"] == BASELINE else Ours(setting)
        _say(answers, {"ready": True})
        for line in sys.stdin:
            _say(answers, _answer(contender, json.loads(line)))
    except (TokcompError, ValueError, RuntimeError, OSError) as fault:
        _say(answers, {"fault": " ".join(str(fault).split())})


def _answer(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    pictures = [base64.b64decode(picture) for picture in request.get("pictures", ())]
    if request["do"] == "caption":
        return contender.caption(request["arm"], pictures[0]).to_json()
    if request["do"] == "batch":
        seconds = contender.batch(request["arm"], pictures)
        divided = contender.divisions[request["arm"]] if isinstance(contender, Ours) else ""
        return {"seconds": seconds, "threads": str(divided)}
    if request["do"] == "steps":
        seconds, rows = contender.steps(request["count"], request["rows"])
        return {"seconds": seconds, "rows": rows}
    if request["do"] == "peak":
        scale = 1 if sys.platform == "darwin" else 1024
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    raise ValueError(f"unknown request {request['do']!r}")


def _say(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
