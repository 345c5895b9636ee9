"""The report's numbers and sentences: each says what run.json says and nothing beyond it."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from lineate.report.run import Cost, CostRow, Interval, Run

NBSP = "\u00a0"


class Figure(NamedTuple):
    """One of the headline's big figures."""

    value: str
    label: str
    note: str


def number(value: float | None, digits: int = 3) -> str:
    """`value` with that many significant digits, whole above them: 0.0123, 4.50, 1,234; "–" for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{digits - 1}e}" if exponent < -5 else f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def fixed(value: float | None, decimals: int = 3) -> str:
    """`value` with that many decimals, so that a column lines up; "–" for None."""
    if value is None:
        return "–"
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "not finite"


def percent(value: float | None) -> str:
    """A share of one, in per cent with one decimal."""
    return "–" if value is None else f"{fixed(100 * value, 1)} %"


def duration(seconds: float) -> str:
    """4.2 s, 42 s, 6 min 12 s, 1 h 05 min, unbroken."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 9.95:
        return f"{seconds:.1f}{NBSP}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min{NBSP}{whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h{NBSP}{whole % 3600 // 60:02d}{NBSP}min"


def counted(count: int, noun: str) -> str:
    """1 image, 1,024 images."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def pixels(size: tuple[int, int] | CostRow) -> str:
    """An image size, height × width."""
    height, width = (size.height, size.width) if isinstance(size, CostRow) else size
    return f"{height}{NBSP}×{NBSP}{width}"


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config to dotted keys, as `--set` takes them."""
    rows: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return rows


def sentence(text: str) -> str:
    """`text` with a capital at its start and a full stop at its end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def largest(cost: Cost | None) -> CostRow | None:
    """The row with the most tokens."""
    return max(cost.rows, key=lambda row: row.tokens) if cost and cost.rows else None


def share(interval: Interval | None) -> str:
    """A share and its interval, in per cent: 71.2 % (70.1 to 72.3); "–" for None."""
    if interval is None:
        return "–"
    return f"{percent(interval.value)} ({fixed(100 * interval.low, 1)} to {fixed(100 * interval.high, 1)})"


def headline(run: Run) -> list[str]:
    """Fidelity, speed and time spent, in a sentence or two each."""
    found = run.results
    fidelity, calibration, row = found.fidelity, found.calibration, largest(found.cost)
    before = f", {fixed(found.fidelity_before.patch_cosine)} before calibration" if found.fidelity_before else ""
    said = [
        f"On {counted(fidelity.images, 'held-out image')}, the patch features of the converted model have a mean cosine of"
        f" {fixed(fidelity.patch_cosine)} to the original’s{before}."
    ]
    if found.cost and row:
        times = f"{number(row.converted_ms)}{NBSP}ms against {number(row.original_ms)}{NBSP}ms"
        factor = number(row.speedup)
        speed = f"is {factor} times as fast as" if row.speedup >= 1 else f"runs at {factor} times the speed of"
        said.append(f"At {pixels(row)}{NBSP}px it {speed} the original ({times}).")
        said.append(sentence(found.cost.crossover_note))
    if found.held_out:
        ours, theirs = (percent(model.top1.value) for model in (found.held_out.converted, found.held_out.original))
        said.append(f"Trained on labels, it has a top-1 of {ours} against the original’s {theirs}.")
    spent = f"The whole run took {duration(run.total_seconds)}"
    if calibration:
        spent += f", {duration(calibration.seconds)} of it calibration on {counted(calibration.images, 'image')}"
    return [*said, spent + "."]


def figures(run: Run) -> list[Figure]:
    """The headline's big figures: fidelity, speed, crossover, time; those that the run has."""
    found = run.results
    before, row = found.fidelity_before, largest(found.cost)
    worst = f"lowest image {fixed(found.fidelity.patch_cosine_worst)}"
    note = f"{worst}; {fixed(before.patch_cosine)} before calibration" if before else worst
    shown = [Figure(fixed(found.fidelity.patch_cosine), "cosine of patch features", note)]
    if row:
        note = f"at {pixels(row)}{NBSP}px, {counted(row.tokens, 'token')}"
        shown.append(Figure(f"{number(row.speedup)}×", "the original’s speed", note))
    if found.cost and found.cost.crossover_px is not None:
        note = "square image above which the converted model is faster"
        shown.append(Figure(f"{found.cost.crossover_px:.0f}{NBSP}px", "crossover", note))
    spent = f"{duration(found.calibration.seconds)} of it calibration" if found.calibration else "not calibrated"
    return [*shown, Figure(duration(run.total_seconds), "for the whole run", spent)]
