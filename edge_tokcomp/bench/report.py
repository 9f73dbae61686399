"""What a run says: medians, ratios to the baseline round by round, and what could be reached at the rates measured."""

from __future__ import annotations

from statistics import median
from typing import Any

from .contenders import BASELINE


def summary(document: dict[str, Any], subject: str) -> dict[str, Any]:
    """``document`` with the figures of every contender and the ``ratios`` of ``subject``, an arm, to the baseline."""
    tokens, threads = document["setting"]["tokens"], document["setting"]["threads"]
    arms = {}
    for arm, samples in document["singles"].items():
        first, whole = median(s["first"] for s in samples), median(s["whole"] for s in samples)
        arms[arm] = {
            "ttft_ms": first * 1e3, "whole_ms": whole * 1e3,
            "decode_tokens_per_second": (tokens - 1) / median(s["whole"] - s["first"] for s in samples),
            "images_per_second": 1 / whole, "at_once": 1,
            "stages_ms": {name: median(s["stages_ms"][name] for s in samples) for name in samples[0]["stages_ms"]},
            "prompt_rows": samples[0]["prompt"], "image_tokens": list(samples[0]["tokens"]),
            "peak_bytes": document["peak_bytes"][arm],
        }  # fmt: skip
    for arm, batches in document["batches"].items():
        arms[arm] |= {
            "images_per_second": document["plan"]["images"] / median(batch["seconds"] for batch in batches),
            "at_once": document["setting"]["parallel"], "threads": batches[-1]["threads"],
            "peak_bytes_batch": document["peak_bytes"][f"{arm}, {document['setting']['parallel']} at once"],
        }  # fmt: skip
    found = {**document, "subject": subject, "arms": arms, "threads": threads}
    if BASELINE in arms:
        theirs = document["singles"][BASELINE]
        pairs = list(zip(theirs, document["singles"][subject], strict=True))
        found["ratios"] = {
            "ttft": median(a["first"] / b["first"] for a, b in pairs),
            "images_per_second": arms[subject]["images_per_second"] / arms[BASELINE]["images_per_second"],
        }
        found["ceilings"] = _ceilings(arms, subject, document)
    return found


def _ceilings(arms: dict[str, Any], subject: str, document: dict[str, Any]) -> dict[str, float]:
    """The ratios that could be had if nothing but encoding, prefill and generation took time, each at its measured
    rate: of prefill that of the longest prompt of ours, of generation that of all sequences in one step."""
    tokens, count = document["setting"]["tokens"], document["setting"]["parallel"]
    own, longest = arms[subject], max(
        (arm for name, arm in arms.items() if name != BASELINE), key=lambda arm: float(arm["prompt_rows"])
    )  # fmt: skip
    rate = longest["prompt_rows"] / longest["stages_ms"]["prefill"]
    encode, prefill = own["stages_ms"]["encode"], own["prompt_rows"] / rate
    step = document["steps_s"][str(count)] * 1e3
    batch = encode + prefill + tokens * step / count
    theirs = arms[BASELINE]
    # With the baseline's own encoding, whatever becomes of the rest.
    text = longest["prompt_rows"] - longest["image_tokens"][1]
    left = theirs["ttft_ms"] - longest["image_tokens"][1] / rate
    return {
        "ttft": theirs["ttft_ms"] / (encode + prefill),
        "images_per_second": theirs["whole_ms"] / batch,
        "ttft_if_encoding_stayed": theirs["ttft_ms"] / max(left, text / rate),
        "prefill_rows_per_second": rate * 1e3,
        "generated_tokens_per_second": count / step * 1e3,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a contender, then ratios and ceilings in lines."""
    base = found["arms"].get(BASELINE)
    lines = [
        "| contender | image tokens | encode | compress | prefill | first token ms | ratio | generates, tokens/s "
        "| images/s | ratio | at once | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        stages = [f"{arm['stages_ms'][stage]:.0f}" if arm["stages_ms"] else "" for stage in _SHOWN]
        tokens = f"{arm['image_tokens'][0]} → {arm['image_tokens'][1]}" if arm["stages_ms"] else "all"
        ratios = ["", ""]
        if base:
            ratios = [
                f"{base['ttft_ms'] / arm['ttft_ms']:.2f}", f"{arm['images_per_second'] / base['images_per_second']:.2f}"
            ]  # fmt: skip
        peak = arm.get("peak_bytes_batch", arm["peak_bytes"]) / 2**20
        cells = [
            f"`{name}`", tokens, *stages, f"{arm['ttft_ms']:.0f}", ratios[0],
            f"{arm['decode_tokens_per_second']:.1f}", f"{arm['images_per_second']:.3f}", ratios[1],
            str(arm["at_once"]), f"{peak:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if "ratios" not in found:
        return "\n".join(lines)
    ratios, ceilings = found["ratios"], found["ceilings"]
    own = found["arms"][found["subject"]]
    return "\n".join([
        *lines, "",
        f"`{found['subject']}` against {BASELINE}: first token {ratios['ttft']:.2f} times as fast (median of the "
        f"rounds' ratios), {ratios['images_per_second']:.2f} times the images a second.",
        f"At the measured rates (encode {own['stages_ms']['encode']:.0f} ms, prefill "
        f"{ceilings['prefill_rows_per_second']:.1f} rows/s, {found['setting']['parallel']} sequences "
        f"{ceilings['generated_tokens_per_second']:.1f} tokens/s) no more than {ceilings['ttft']:.2f} and "
        f"{ceilings['images_per_second']:.2f} times could be had.",
        f"Amdahl: had encoding stayed {BASELINE}'s, the first token could come "
        f"{ceilings['ttft_if_encoding_stayed']:.2f} times as fast at best, with no image token at all.",
    ])  # fmt: skip


_SHOWN = ("encode", "compress", "prefill")
