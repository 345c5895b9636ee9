"""Figure 6: SD3.5-Medium's multiply-adds and latency against resolution, original and converted, beside the paper's latencies.

    python benchmarks/sd35.py macs && python experiments/figure6.py

Reads benchmarks/results/sd35-macs.json and, where a GPU wrote it, sd35-time-cuda.json; writes results/figure6.json and
docs/pictures/figure6.png. The paper names a run of 28 steps: 25 s at 1024 px and 231 s at 2048 px for SD3.5-M, 19 s and 157 s for
SD3.5-T⁵ (Table 7), pictures and prompts a run unsaid; its FLOPs carry no figures that could be read off exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from lineate import runs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "results"
OUT = Path(__file__).parent / "results" / "figure6.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "figure6.png"
PAPER_S = {"original": {"1024": 25, "2048": 231}, "paper's 18": {"1024": 19, "2048": 157}}


def read(name: str) -> dict[str, Any] | None:
    """A result of benchmarks/sd35.py, or None where there is none yet."""
    file = BENCHMARKS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def latencies(timed: dict[str, Any] | None) -> dict[str, dict[str, float]] | str:
    """Seconds of a compiled run by model and size."""
    if timed is None:
        return "not run"
    found: dict[str, dict[str, float]] = {}
    for row in timed["rows"]:
        if row["compiled"]:
            found.setdefault(row["model"], {})[str(row["px"])] = row["run_s"]
    return found


def draw(counts: dict[str, dict[str, float]], ours: dict[str, dict[str, float]] | str) -> None:
    """Multiply-adds on the left, seconds on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, by_px in counts.items():
        left.plot([int(px) for px in by_px], [gmacs / 1e3 for gmacs in by_px.values()], marker="o", markersize=3, label=name)
    left.set(xlabel="side of the picture, px", ylabel="multiply-adds of a pass, 10¹²", yscale="log")
    for name, by_px in PAPER_S.items():
        right.plot([int(px) for px in by_px], list(by_px.values()), "x--", label=f"{name}, the paper")
    if isinstance(ours, str):
        right.set_title("ours: not run, no GPU", fontsize=9)
    else:
        for name, by_px in ours.items():
            right.plot([int(px) for px in by_px], list(by_px.values()), marker="o", markersize=3, label=f"{name}, ours")
    right.set(xlabel="side of the picture, px", ylabel="28 steps, s", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """Put together, write the JSON and draw."""
    counted, timed = read("sd35-macs.json"), read("sd35-time-cuda.json")
    if counted is None:
        raise SystemExit("run `python benchmarks/sd35.py macs` first")
    ours = latencies(timed)
    environment = {"macs": counted["environment"], "latency": timed["environment"] if timed else None}
    runs.write_json(OUT, {"gmacs": counted["counts"], "run_s": ours, "paper_run_s": PAPER_S, "environment": environment})
    draw(counted["counts"], ours)


if __name__ == "__main__":
    main()
