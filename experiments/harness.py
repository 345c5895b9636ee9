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
import copy
import json
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import small
import torch
from timm.models import VisionTransformer
from torch import nn

import lineate
from lineate import checkpoint, runs
from lineate.convert import record
from lineate.data import LabelledImages, open_data
from lineate.evaluate.cost import count_operator_macs
from lineate.recipes import deit, t5
from lineate.settings import read_settings
from lineate.statistics import Interval, mean_interval
from lineate.train import TrainError

RESULTS = Path(__file__).parent / "results" / "small"


@dataclass(frozen=True)
class Run:
    """A conversion of the host: preset and fields (`--set`), calibrated first or not, tuned by a protocol or not.

    `share` is how much of the tuning's epochs and warm-up it gets, at either scale.
    """

    preset: str
    set: tuple[str, ...] = ()
    tune: str | None = "ft"
    calibrated: bool = False
    share: float = 1.0

    @property
    def name(self) -> str:
        """A name that says all of it and can be a folder's."""
        share = [f"share={self.share:g}"] if self.share != 1 else []
        parts = [self.preset, *self.set, *share, *(["calibrated"] if self.calibrated else []), self.tune or "untuned"]
        return re.sub(r"[^\w.=,+-]", "_", ",".join(parts))

    def conversion_fields(self) -> list[str]:
        """The fields of the conversion that this run sets."""
        return [field for field in self.set if not field.startswith("train.")]


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, the paper's figures, and the runs that give ours, column by column.

    `size` is what the paper prints of its parameters and multiply-adds.
    """

    label: str
    paper: tuple[float | str | None, ...]
    runs: tuple[Run | None, ...]
    size: str = ""


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
    """A table of the paper: what it shows, the names of its columns, its rows, what reading it needs, and where it is run.

    `against` is the label of the row that the others are compared with, image by image.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    scale: Scale | None = None
    against: str = ""

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


@lru_cache(1)
def calibrated(
    preset: str, fields: tuple[str, ...], seed: int, train: LabelledImages, test: LabelledImages
) -> tuple[nn.Module, Any]:
    """A calibrated conversion and its results, made once for all runs that are tuned from it."""
    model, results = converted(preset, fields, seed)
    config = small.CALIBRATION.model_copy(update={"seed": seed})
    images = small.unlabelled(train, config.pool, seed)
    results["calibration"] = lineate.calibrate(model, images, config=config).model_dump(mode="json")
    results["calibrated_only"] = figures(model, test)
    return model, results


def converted(preset: str, fields: tuple[str, ...], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The small host, converted; and what is known of it."""
    conversion = read_settings(preset_name=preset, assignments=list(fields), seed=seed).conversion
    assert conversion is not None
    model = lineate.convert(checkpoint.original_of(checkpoint.load(small.HOST)).to(small.DEVICE), conversion)
    return model, {"new_parameters": record(model).count("new")}


def execute(run: Run, seed: int, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """Convert the small host, calibrate, tune and evaluate as `run` says; what a result file holds."""
    started = time.perf_counter()
    fields = tuple(run.conversion_fields())
    config = small.tuning(run.tune, [field for field in run.set if field.startswith("train.")], seed, run.share)
    if run.calibrated:
        model, results = copy.deepcopy(calibrated(run.preset, fields, seed, train, test))
    else:
        model, results = converted(run.preset, fields, seed)
    if config is not None:
        try:
            with tempfile.TemporaryDirectory() as work:
                results["tuning"] = small.tune(model, config, train, Path(work)).model_dump(mode="json")
        except TrainError as error:
            results["diverged"] = str(error)
    if "diverged" not in results:
        results["final"] = figures(model, test)
    return {
        "run": run.name, "seed": seed, "conversion": record(model).conversion.model_dump(mode="json"),
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


def above(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """Points of top-1 above the other run's, seed by seed and image by image, with Student's 95 % interval over the images."""
    theirs = {row["seed"]: correct(row) for row in others if "final" in row["results"]}
    pairs = [(correct(row), theirs[row["seed"]]) for row in rows if "final" in row["results"] and row["seed"] in theirs]
    if not pairs:
        return ""
    found = mean_interval((100.0 * np.mean([ours - theirs for ours, theirs in pairs], axis=0)).tolist())
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def correct(row: dict[str, Any]) -> Any:
    """(images,) 1 where a run's model was right, as `figures` packed it."""
    final = row["results"]["final"]
    return np.unpackbits(np.frombuffer(base64.b64decode(final["correct"]), np.uint8), count=final["images"]).astype(np.float64)


def counted(run: Run) -> str:
    """New parameters and multiply-adds of a run's conversion of the paper's DeiT-T at 224 px, counted."""
    host = VisionTransformer(embed_dim=192, depth=12, num_heads=3, class_token=False, global_pool="avg", fc_norm=False).eval()
    conversion = read_settings(preset_name=run.preset, assignments=run.conversion_fields()).conversion
    assert conversion is not None
    model = lineate.convert(host, conversion)
    return f"+{record(model).count('new') / 1e6:.2f}M, {count_operator_macs(model, torch.zeros(1, 3, 224, 224)):.2f}G"


def markdown(table: Table) -> str:
    """The table with the paper's figures beside ours; a column that would be empty is left out."""
    columns = []
    for place, column in enumerate(table.columns):
        papers, runs = [row.paper[place] for row in table.rows], [row.runs[place] for row in table.rows]
        columns.append([f"{column}, paper", *("" if figure is None else str(figure) for figure in papers)])
        found = [None if run is None else read(run, table.on.folder) for run in runs]
        columns.append([f"{column}, here", *("" if rows is None else table.on.shown(rows) for rows in found)])
        reference = next((rows for row, rows in zip(table.rows, found, strict=True) if row.label == table.against), None)
        if reference:
            compared = ("" if rows is None or rows is reference else above(rows, reference) for rows in found)
            columns.append([f"{column}, here, above {table.against}", *compared])
    if any(row.size for row in table.rows):
        columns.append(["parameters and multiply-adds, paper", *(row.size for row in table.rows)])
        first = [next((run for run in row.runs if run is not None), None) for row in table.rows]
        columns.append(["counted here", *("" if run is None else counted(run) for run in first)])
    heads, *lines = zip(["", *(row.label for row in table.rows)], *(column for column in columns if any(column[1:])), strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


IMAGENET = 1_281_167
FLOPS = 40e12  # a GPU sustains, assumed


def full_size(table: Table, host: str, data: str) -> Iterator[str]:
    """What a table takes at full size: for classifiers the host's command and estimates of time, then a command a run."""
    if table.on is CLASSES:
        tune, base = t5(), deit()
        hours = 3 * 2 * 1.25e9 * IMAGENET / FLOPS / 3600  # an epoch of DeiT-T, backward as two forwards
        rate = f"at {FLOPS / 1e12:.0f} TFLOP/s a GPU, which is assumed and not measured"
        train = ["accelerate", "launch", "-m", "lineate", "train", "timm:deit_tiny_patch16_224", "--scratch", "--data", data]
        options = ["--set", "class_token=drop", "--preset", "softmax", "--recipe", "deit", "--device", "cuda"]
        yield f"# The host, {base.epochs:g} epochs, {base.epochs * hours:.0f} GPU hours {rate}:"
        yield shlex.join([*train, *options, "--out", str(Path(host).parent)])
        yield f"# Each row, {tune.epochs:g} epochs, {tune.epochs * hours:.1f} GPU hours, where reading pictures keeps up:"
    yield from (table.on.command(table, run, host, data) for run in table.every())


def command(table: Table, run: Run, host: str, data: str) -> str:
    """The command that runs one row at full size."""
    out = f"runs/{table.name}/{run.name}"
    fields = [*run.set, *([f"train.protocol={run.tune}"] if run.tune else [])]
    if run.share != 1:
        fields += [f"train.epochs={t5().epochs * run.share:g}", f"train.warmup_epochs={t5().warmup_epochs * run.share:g}"]
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
        print(*full_size(table, options.host, data), sep="\n")
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
