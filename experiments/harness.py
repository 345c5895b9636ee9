"""What the tables share: a Run is one conversion of the trained softmax host, perhaps calibrated, perhaps tuned, then evaluated.

A run is written as the command line would take it, so that every row of a table is also one command. Each (run, seed) is one
JSON file below results/small/; what is there is not run again, so a broken table goes on where it stopped, and tables that
share a run share its file. `--shard 0/2` and `--shard 1/2` let two processes share the work.

A small scale (small.py: CIFAR-10 and a ViT that a CPU can train; generation.py: the same and a DiT) runs here, row after row; at
full size, on ImageNet and many GPUs, every row is a `lineate train` of its own, and `--scale full` prints these commands.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import small
import torch
from torch import nn

import lineate
from lineate import checkpoint, runs
from lineate.convert import record
from lineate.data import LabelledImages, open_data
from lineate.settings import read_settings
from lineate.statistics import Interval, mean_interval
from lineate.train import TrainError

RESULTS = Path(__file__).parent / "results" / "small"


@dataclass(frozen=True)
class Run:
    """A conversion of the host: preset and fields (`--set`), calibrated first or not, tuned by a protocol or not."""

    preset: str
    set: tuple[str, ...] = ()
    tune: str | None = "ft"
    calibrated: bool = False

    @property
    def name(self) -> str:
        """A name that says all of it and can be a folder's."""
        parts = [self.preset, *self.set, *(["calibrated"] if self.calibrated else []), self.tune or "untuned"]
        return re.sub(r"[^\w.=,+-]", "_", ",".join(parts))

    def conversion_fields(self) -> list[str]:
        """The fields of the conversion that this run sets."""
        return [field for field in self.set if not field.startswith("train.")]


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, the paper's figures, and the runs that give ours, column by column."""

    label: str
    paper: tuple[float | str | None, ...]
    runs: tuple[Run | None, ...]


@dataclass(frozen=True)
class Scale:
    """What the runs of a table are done with: `execute(run, seed, *opened(data))` gives a result, `shown(results)` a cell.

    `command(table, run, host, data)` does a run at full size, from `host` where no other is said.
    """

    folder: str
    data: str
    opened: Callable[[str], tuple[Any, ...]]
    execute: Callable[..., dict[str, Any]]
    shown: Callable[..., str]
    command: Callable[[Table, Run, str, str], str]
    host: str


@dataclass(frozen=True)
class Table:
    """A table of the paper: what it shows, the names of its columns, its rows, what reading it needs, and where it is run."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    scale: Scale | None = None

    @property
    def on(self) -> Scale:
        """Where it is run: with classifiers, where nothing is said."""
        return self.scale or CLASSES

    def every(self) -> Iterator[Run]:
        """Every run of the table once, in order."""
        yield from dict.fromkeys(run for row in self.rows for run in row.runs if run is not None)


def result_file(run: Run, seed: int, folder: str = "") -> Path:
    """Where the results of a run with this seed are kept."""
    return RESULTS / folder / run.name / f"seed{seed}.json"


def opened(data: str) -> tuple[Any, ...]:
    """Labelled images to learn from and to measure on."""
    return tuple(open_data(data, split=split) for split in ("train", "test"))


def execute(run: Run, seed: int, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """Convert the small host, calibrate, tune and evaluate as `run` says; what a result file holds."""
    started = time.perf_counter()
    settings = read_settings(preset_name=run.preset, assignments=run.conversion_fields(), seed=seed)
    config = small.tuning(run.tune, [field for field in run.set if field.startswith("train.")], seed)
    assert settings.conversion is not None
    model = lineate.convert(checkpoint.original_of(checkpoint.load(small.HOST)).to(small.DEVICE), settings.conversion)
    results: dict[str, Any] = {"new_parameters": record(model).count("new")}
    if run.calibrated:
        calibration = small.CALIBRATION.model_copy(update={"seed": seed})
        images = small.unlabelled(train, calibration.pool, seed)
        results["calibration"] = lineate.calibrate(model, images, config=calibration).model_dump(mode="json")
        results["calibrated_only"] = figures(model, test)
    if config is not None:
        try:
            with tempfile.TemporaryDirectory() as work:
                results["tuning"] = small.tune(model, config, train, Path(work)).model_dump(mode="json")
        except TrainError as error:
            results["diverged"] = str(error)
    if "diverged" not in results:
        results["final"] = figures(model, test)
    return {
        "run": run.name, "seed": seed, "conversion": settings.conversion.model_dump(mode="json"),
        "train": config and config.model_dump(mode="json"), "results": results,
        "seconds": time.perf_counter() - started, "created": runs.now(),
    }  # fmt: skip


def figures(model: nn.Module, test: LabelledImages) -> dict[str, Any]:
    """Top-1 with its Wilson interval, and which images were right, packed, so that runs can be compared in pairs."""
    outcome = small.evaluate(model, test)
    packed = base64.b64encode(np.packbits(outcome.correct.numpy()).tobytes()).decode()
    return {"top1": outcome.figures.top1.model_dump(), "images": outcome.figures.images, "correct": packed}


def read(run: Run, folder: str = "") -> list[dict[str, Any]]:
    """The results of a run, seed by seed."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / folder / run.name).glob("seed*.json"))]


def accuracy(rows: Sequence[dict[str, Any]], part: str = "final") -> Interval | None:
    """Top-1: over seeds a mean with Student's interval, of one seed Wilson's; None where nothing was run or all diverged."""
    found = [row["results"][part] for row in rows if part in row["results"]]
    if len(found) > 1:
        return mean_interval([figure["top1"]["value"] for figure in found])
    return Interval(**found[0]["top1"]) if found else None


def shown(rows: Sequence[dict[str, Any]], part: str = "final") -> str:
    """A table's cell: "61.2 ± 0.5 (3)", percent and number of seeds; "diverged" and "not run" in words."""
    found = accuracy(rows, part)
    diverged = sum("diverged" in row["results"] for row in rows)
    if found is None:
        return f"diverged ({diverged})" if diverged else "not run"
    half = 50 * (found.high - found.low)
    return f"{100 * found.value:.1f} ± {half:.1f} ({len(rows) - diverged})" + (f", {diverged} diverged" if diverged else "")


def markdown(table: Table) -> str:
    """The table with the paper's figures beside ours; a column that would be empty is left out."""
    columns = []
    for place, column in enumerate(table.columns):
        papers, found = [row.paper[place] for row in table.rows], [row.runs[place] for row in table.rows]
        columns.append([f"{column}, paper", *("" if figure is None else str(figure) for figure in papers)])
        ours = ("" if run is None else table.on.shown(read(run, table.on.folder)) for run in found)
        columns.append([f"{column}, here", *ours])
    heads, *lines = zip(["", *(row.label for row in table.rows)], *(column for column in columns if any(column[1:])), strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def command(table: Table, run: Run, host: str, data: str) -> str:
    """The command that runs one row at full size."""
    out = f"runs/{table.name}/{run.name}"
    fields = [*run.set, *([f"train.protocol={run.tune}"] if run.tune else [])]
    options = ["--preset", run.preset, *(word for field in fields for word in ("--set", field)), "--out", out]
    if run.tune is not None:
        before = ["--calibrate-on", "PHOTOGRAPHS"] if run.calibrated else []
        train = ["accelerate", "launch", "-m", "lineate", "train", host, "--data", data, "--recipe", "t5", "--device", "cuda"]
        return shlex.join([*train, *before, *options])
    make = ["calibrate", host, "--images", "PHOTOGRAPHS"] if run.calibrated else ["convert", host]
    return f"{shlex.join(['lineate', *make, *options])} && {shlex.join(['lineate', 'evaluate', out, '--data', data])}"


def main(table: Table) -> None:
    """The command line that every table has."""
    parser = argparse.ArgumentParser(description=table.title)
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--data", help="the CIFAR-10 folder, or at full size ImageNet as lineate train takes it")
    parser.add_argument("--host", default=table.on.host, help="at full size the softmax baseline")
    parser.add_argument("--seed", type=int, action="append", help="several may be given (default: 0, 1, 2)")
    parser.add_argument("--only", default="*", help="a glob over the names of runs")
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n parts of the work")
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    if options.scale == "full":
        data = options.data or "hf:ILSVRC/imagenet-1k"
        print(*(table.on.command(table, run, options.host, data) for run in table.every()), sep="\n")
        return
    if not options.table:
        if options.threads:
            torch.set_num_threads(options.threads)
        chosen = [run for run in table.every() if fnmatchcase(run.name, options.only)]
        run_all(table.on, chosen, options.seed or [0, 1, 2], options.data or table.on.data, options.shard)
    print(markdown(table))


def run_all(scale: Scale, wanted: Sequence[Run], seeds: Sequence[int], data: str, shard: str) -> None:
    """Every (run, seed) of this shard that has no result yet; each is written when it is done."""
    part, parts = (int(number) for number in shard.split("/"))
    mine = list(product(seeds, wanted))[part::parts]
    ready = scale.opened(data)
    environment = runs.environment(small.DEVICE)
    for seed, run in mine:
        file = result_file(run, seed, scale.folder)
        if file.exists():
            continue
        row = scale.execute(run, seed, *ready) | {"environment": environment}
        file.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(file, row)
        print(f"{run.name} seed {seed}: {scale.shown([row])}, {row['seconds']:.0f} s", flush=True)


CLASSES = Scale("", small.DATA, opened, execute, shown, command, "runs/deit/model")
