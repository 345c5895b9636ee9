"""How far a calibration at one resolution carries to others, on the embedded model and held-out photographs.

    python benchmarks/resolution.py --preset t5-plus --calibrate 224,336 --at 224,336,518,1022
    python benchmarks/resolution.py --table

A row is one (preset, px calibrated at, seed), compared with the original at every size of --at. Rows that the file has already
are not run again. A row takes some ten minutes on two CPU cores at 224 px, and more than twice that at 336 px.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lineate import runs
from lineate.embedded import CALIBRATION_PHOTOS, HELD_OUT_PHOTOS, photographs
from lineate.evaluate.cost import check_sizes
from lineate.evaluate.fidelity import fidelity
from lineate.images import centre_crop
from lineate.linearize import crops, fit, load_pair
from lineate.settings import Settings, read_settings

RESULTS = Path(__file__).parent / "results" / "resolution.json"
KEY = ("preset", "calibrated_px", "seed")


def sizes(text: str) -> list[int]:
    """Pixels, separated by commas."""
    return [int(size) for size in text.split(",")]


def measure(settings: Settings, seed: int, px: int, at: list[int]) -> dict[str, Any]:
    """Convert, calibrate at `px`, and compare with the original at every size of `at`."""
    pair = load_pair("embedded", settings.conversion, image_size=px)
    check_sizes(pair.original, [(size, size) for size in at])
    pool = crops(pair.source, photographs(CALIBRATION_PHOTOS), settings.calibration, seed)
    result = fit(pair.converted, pool, settings.calibration, lambda *_: None)
    found = {}
    for size in at:
        held_out = [centre_crop(path, size, pair.source.mean, pair.source.std) for path in photographs(HELD_OUT_PHOTOS)]
        found[str(size)] = fidelity(pair.original, pair.converted, held_out).model_dump(mode="json")
    return {"seconds": result.seconds, "fidelity": found}


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean patch cosine to the original's features, a line a row, a column a size."""
    at = sorted({int(size) for row in rows for size in row["fidelity"]})
    lines = [f"| conversion | calibrated at | seed | {' | '.join(f'{size} px' for size in at)} |", "| --- " * (3 + len(at)) + "|"]
    for row in sorted(rows, key=lambda row: [row[name] for name in KEY]):
        cells = [f"{row['fidelity'][str(size)]['patch_cosine']:.3f}" if str(size) in row["fidelity"] else "" for size in at]
        lines.append(f"| {row['preset']} | {row['calibrated_px']} px | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="t5-plus")
    parser.add_argument("--calibrate", type=sizes, default=[224], metavar="PX,PX", help="sizes to calibrate at")
    parser.add_argument("--at", type=sizes, default=[224, 336, 518, 1022], metavar="PX,PX", help="sizes to compare at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for px in [] if args.table else args.calibrate:
        row = {"preset": args.preset, "calibrated_px": px, "seed": args.seed}
        if any({name: other[name] for name in KEY} == row for other in _read(args.out)):
            continue
        environment = runs.environment(torch.device("cpu"))
        found = measure(read_settings(preset_name=args.preset, seed=args.seed), args.seed, px, args.at)
        runs.write_json(args.out, [*_read(args.out), row | found | {"environment": environment}])
    print(table(_read(args.out)))


if __name__ == "__main__":
    main()
