"""What a run says: medians, ratios to the baseline round by round, and what could be reached at the rates measured.

A run that was stopped says it of its whole rounds; what it had not come to is missing or ``None``.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from .contenders import BASELINE
from .run import batch_label


def rounds(document: dict[str, Any]) -> int:
    """How many are whole."""
    return min(map(len, document["singles"].values()))


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """``document``, of one round or more, with the figures of every contender and the ``ratios`` of the plan's subject
    to the baseline."""
    subject = document["plan"]["subject"]
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
            "peak_bytes": document["peak_bytes"].get(arm),
        }  # fmt: skip
    for arm, batches in document["batches"].items():
        if batches:
            arms[arm] |= _at_once(arm, arms[arm], document)
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


def _at_once(arm: str, own: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Figures of an arm's batches. ``sharing``: how many times the images a second that are had one at a time, and the
    ``bound`` of that by the rates measured: had a batch nothing to do but encoding and prefill as they are one at a
    time, and a share of the steps of all sequences. The text before the picture, which a batch reads once, is in it.
    """
    batches, count = document["batches"][arm], document["setting"]["parallel"]
    rate = document["plan"]["images"] / median(batch["seconds"] for batch in batches)
    alone, least = own["images_per_second"], own["stages_ms"]["encode"] + own["stages_ms"]["prefill"]
    bound = own["whole_ms"] / (least + _generation_ms(document, count))
    return {
        "images_per_second": rate, "at_once": count, "threads": batches[-1]["threads"],
        "peak_bytes_batch": document["peak_bytes"].get(batch_label(arm, count)),
        "sharing": {"images_per_second_alone": alone, "speed_up": rate / alone, "bound": bound},
    }  # fmt: skip


def _generation_ms(document: dict[str, Any], count: int) -> float:
    """Of one caption where ``count`` are generated at once."""
    return float(document["setting"]["tokens"] * document["steps_s"][str(count)] * 1e3 / count)


def _ceilings(arms: dict[str, Any], subject: str, document: dict[str, Any]) -> dict[str, float]:
    """The ratios that could be had if nothing but encoding, prefill and generation took time, each at its measured
    rate: of prefill that of the longest prompt of ours, of generation that of all sequences in one step."""
    count = document["setting"]["parallel"]
    own, longest = arms[subject], max(
        (arm for name, arm in arms.items() if name != BASELINE), key=lambda arm: float(arm["prompt_rows"])
    )  # fmt: skip
    rate = longest["prompt_rows"] / longest["stages_ms"]["prefill"]
    encode, prefill = own["stages_ms"]["encode"], own["prompt_rows"] / rate
    batch = encode + prefill + _generation_ms(document, count)
    theirs = arms[BASELINE]
    # With the baseline's own encoding, whatever becomes of the rest.
    text = longest["prompt_rows"] - longest["image_tokens"][1]
    left = theirs["ttft_ms"] - longest["image_tokens"][1] / rate
    return {
        "ttft": theirs["ttft_ms"] / (encode + prefill),
        "images_per_second": theirs["whole_ms"] / batch,
        "ttft_if_encoding_stayed": theirs["ttft_ms"] / max(left, text / rate),
        "prefill_rows_per_second": rate * 1e3,
        "generated_tokens_per_second": count / document["steps_s"][str(count)],
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a contender, then ratios and ceilings in lines."""
    base = found["arms"].get(BASELINE)
    lines = [
        "| contender | image tokens | encode | compress | prefill | first token ms | ratio | generates, tokens/s "
        "| images/s | ratio | at once | by sharing | allowed | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        stages = [f"{arm['stages_ms'][stage]:.0f}" if arm["stages_ms"] else "" for stage in _SHOWN]
        tokens = f"{arm['image_tokens'][0]} → {arm['image_tokens'][1]}" if arm["stages_ms"] else "all"
        ratios = ["", ""]
        if base:
            ratios = [
                f"{base['ttft_ms'] / arm['ttft_ms']:.2f}", f"{arm['images_per_second'] / base['images_per_second']:.2f}"
            ]  # fmt: skip
        shared = [f"{arm['sharing'][name]:.2f}" if "sharing" in arm else "" for name in ("speed_up", "bound")]
        peak = arm.get("peak_bytes_batch", arm["peak_bytes"])
        cells = [
            f"`{name}`", tokens, *stages, f"{arm['ttft_ms']:.0f}", ratios[0],
            f"{arm['decode_tokens_per_second']:.1f}", f"{arm['images_per_second']:.3f}", ratios[1],
            str(arm["at_once"]), *shared, "" if peak is None else f"{peak / 2**20:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if any("sharing" in arm for arm in found["arms"].values()):
        lines += ["", _sharing_line(found)]
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


def _sharing_line(found: dict[str, Any]) -> str:
    """What the columns on sharing mean."""
    count, rows, wanted = found["setting"]["parallel"], found["steps_rows"], found["steps_rows_wanted"]
    held = rows[str(count)]
    short = f" (not {wanted}, of which the context does not hold as many)" if held < wanted else ""
    alone, together = (1e3 * found["steps_s"][key] for key in ("1", str(count)))
    return (
        f"By sharing: images a second of {count} captions at once, against one at a time by the same arm. Allowed: had "
        f"a batch nothing to do but encoding, prefill and a share of the steps of {count} sequences, {together:.0f} ms "
        f"each behind {held} rows{short} where one sequence alone takes {alone:.0f} ms behind {rows['1']}."
    )


_SHOWN = ("encode", "compress", "prefill")
