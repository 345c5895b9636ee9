"""Calibrate, then tune: how much of the fine-tuning does a calibration without labels save? (Our question, not the paper's.)

    python experiments/tune.py --scale small --data ../shared/data/cifar10
    python experiments/tune.py --draw             docs/pictures/tune.png from what there is

Accuracy against training images for the paper's T⁵ as it starts and calibrated, under Freeze, LoRA and FT. Every budget is a
training of its own, whose schedule ends with it; the warm-up is a sixth of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import small
from harness import Row, Run, Table, above, accuracy, main, read

BUDGETS = (0.1, 0.2, 0.5, 1.0)  # of the whole tuning
PROTOCOLS = {"freeze": "Freeze", "lora": "LoRA", "ft": "FT"}
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "tune.png"
TRAINING_IMAGES = 50_000


def run(budget: float, protocol: str, calibrated: bool) -> Run:
    """One budget; the whole one is the common config, so that other tables share the run."""
    return Run("t5-paper", (), protocol, calibrated, budget)


def images(budget: float) -> int:
    """Training images that are shown."""
    return round(budget * small.TUNING.epochs * TRAINING_IMAGES)


def columns() -> list[tuple[str, bool]]:
    """Every protocol, as it starts and calibrated."""
    return [(protocol, calibrated) for protocol in PROTOCOLS for calibrated in (False, True)]


TABLE = Table(
    "tune",
    "Calibrate, then tune: top-1 by training images",
    tuple(f"{PROTOCOLS[protocol]}{', calibrated' if calibrated else ''}" for protocol, calibrated in columns()),
    tuple(Row(f"{images(budget):,}", (None,) * 6, tuple(run(budget, *column) for column in columns())) for budget in BUDGETS),
)


def goal() -> str:
    """Whether a calibrated model tuned by a fifth is where one as the paper starts gets to by the whole, protocol by protocol."""
    found = [
        f"{label} {above(read(run(0.2, protocol, True)), read(run(1.0, protocol, False))) or 'not run'}"
        for protocol, label in PROTOCOLS.items()
    ]
    return "Calibrated and tuned by a fifth, above the paper's start and the whole tuning, in points: " + "; ".join(found) + "."


def draw() -> None:
    """A panel a protocol: top-1 against images, as it starts and calibrated, with intervals over seeds."""
    import matplotlib.pyplot as plt

    host = json.loads((small.HOST / "run.json").read_text(encoding="utf-8"))["final"]["top1"]["value"]
    figure, panels = plt.subplots(1, len(PROTOCOLS), figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, (protocol, label) in zip(panels, PROTOCOLS.items(), strict=True):
        for calibrated, colour in ((False, "tab:gray"), (True, "tab:red")):
            points = [(images(budget), accuracy(read(run(budget, protocol, calibrated)))) for budget in BUDGETS]
            found = [(shown, interval) for shown, interval in points if interval is not None]
            if found:
                shown, intervals = zip(*found, strict=True)
                middle = [100 * interval.value for interval in intervals]
                spread = [[100 * (i.value - i.low) for i in intervals], [100 * (i.high - i.value) for i in intervals]]
                axis.errorbar(shown, middle, spread, marker="o", markersize=4, capsize=3, color=colour,
                              label="calibrated first" if calibrated else "as the paper starts")  # fmt: skip
        axis.axhline(100 * host, color="black", linewidth=0.8, linestyle=":", label="the softmax host")
        axis.set(title=label, xscale="log", xlabel="training images")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1, %")
    panels[0].legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    draw() if "--draw" in sys.argv else main(TABLE)
