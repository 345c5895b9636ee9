"""How faithful a calibrated conversion is, preset by preset and seed by seed, on the embedded model and held-out photographs.

    python benchmarks/calibration.py --preset t5 --preset t5-plus --seed 0 --seed 1 --seed 2
    python benchmarks/calibration.py --preset t5-plus --set neighborhood.mix=half
    python benchmarks/calibration.py --table

A row is one (preset, settings, seed). Rows that the file has already are not run again, so a broken run goes on where it stopped.
About four minutes a row on two CPU cores with the default settings; --threads 1 lets two of these share them.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lineate import runs
from lineate.embedded import CALIBRATION_PHOTOS, HELD_OUT_PHOTOS, photographs
from lineate.evaluate.fidelity import fidelity
from lineate.linearize import crops, fit, load_pair, read_held_out
from lineate.settings import Settings, read_settings

RESULTS = Path(__file__).parent / "results" / "calibration.json"


def measure(settings: Settings, seed: int) -> dict[str, Any]:
    """Convert, calibrate, and compare with the original: one row's results."""
    pair = load_pair("embedded", settings.conversion)
    held_out = list(read_held_out(pair.source, photographs(HELD_OUT_PHOTOS))[0].values())
    before = fidelity(pair.original, pair.converted, held_out)
    pool = crops(pair.source, photographs(CALIBRATION_PHOTOS), settings.calibration, seed)
    calibration = fit(pair.converted, pool, settings.calibration, lambda *_: None)
    after = fidelity(pair.original, pair.converted, held_out)
    parts = {"before": before, "calibration": calibration, "after": after}
    return {name: part.model_dump(mode="json") for name, part in parts.items()}


def run(presets: list[str], assignments: list[str], seeds: list[int], out: Path) -> None:
    """Every row that `out` lacks; the file is rewritten after each."""
    environment = runs.environment(torch.device("cpu"))  # of the code that is loaded now, whatever is committed meanwhile
    for preset, seed in product(presets, seeds):
        settings = read_settings(preset_name=preset, assignments=assignments, seed=seed)
        key = {"preset": preset, "set": assignments, "seed": seed}
        if any({name: row[name] for name in key} == key for row in _read(out)):
            continue
        results = measure(settings, seed)
        row = key | {"calibration": settings.calibration.model_dump(mode="json")} | {"results": results}
        runs.write_json(out, [*_read(out), row | {"environment": environment}])
        print(preset, *assignments, f"seed {seed}:", f"patch {results['after']['patch_cosine']:.3f}", flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each preset and settings, the mean over its seeds and, in brackets, the lowest and the highest."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["preset"], *row["set"]), []).append(row)
    lines = [
        "| conversion | seeds | patch cosine | worst photograph | class | pooled | patch, uncalibrated | site error | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, members in groups.items():
        after = [row["results"]["after"] for row in members]
        figures = [[a[key] for a in after] for key in ("patch_cosine", "patch_cosine_worst", "class_cosine", "pooled_cosine")]
        figures.append([row["results"]["before"]["patch_cosine"] for row in members])
        figures.append([mean(a["sites"].values()) for a in after])
        cells = [f"{mean(f):.3f} [{min(f):.3f}, {max(f):.3f}]" if len(f) > 1 else f"{f[0]:.3f}" for f in figures]
        seconds = mean(row["results"]["calibration"]["seconds"] for row in members)
        lines.append(f"| {' '.join(name)} | {len(members)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="FIELD=VALUE")
    parser.add_argument("--seed", action="append", type=int, default=[])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown")
    args = parser.parse_args()
    if args.table:
        print(table(_read(args.out)))
        return
    if not args.preset:
        parser.error("give --preset, or --table")
    if args.threads:
        torch.set_num_threads(args.threads)
    run(args.preset, args.assignments, args.seed or [0], args.out)


if __name__ == "__main__":
    main()
