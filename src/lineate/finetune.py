"""The other job: load -> convert -> (calibrate) -> train on labelled images -> measure on held-out ones -> RUN/model.

Under `accelerate launch` every process does this with the others; the first alone speaks and writes. All that can be checked is
checked before the first long step. RUN/checkpoints and RUN/history.jsonl stay whatever happens, for --resume; when the run is
whole, RUN/run.json says what it takes to repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lineate import checkpoint, runs
from lineate.calibrate import CalibrationConfig, CalibrationResult
from lineate.convert import Conversion, record
from lineate.data import check_classes
from lineate.evaluate import Progress
from lineate.evaluate.top1 import Outcome, Top1, classes, processes
from lineate.linearize import Clock, Pair, _nothing, check_readable, crops, describe, fit, load_pair, tensor_counts
from lineate.train import checkpoints
from lineate.train.classify import Splits, classify, open_splits
from lineate.train.config import TrainConfig
from lineate.train.data import Ordered
from lineate.train.loop import FitResult
from lineate.train.randomness import HOST, derive, left_alone, seed_all

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainPlan:
    """All that `train` needs to know. `conversion` is None for a source that is converted already.

    With `scratch` the host's weights are drawn, not pretrained: a baseline. `held_out` is the data to measure on where it is not
    a split of `data`; `photographs` are calibrated on first, if any. With `stream`, so many pictures an epoch are read in
    passing.
    """

    source: str
    data: str
    out: Path
    conversion: Conversion | None
    train: TrainConfig
    calibration: CalibrationConfig
    held_out: str | None = None
    photographs: tuple[Path, ...] = ()
    scratch: bool = False
    preset: str | None = None
    recipe: str | None = None
    image_size: int | None = None
    stream: int | None = None
    strict: bool = False
    resume: bool = False
    overwrite: bool = False
    device: str = "cpu"
    command: tuple[str, ...] = field(default_factory=lambda: tuple(runs.command_line()))


def train(plan: TrainPlan, *, say: Say = _nothing, progress: Progress = _nothing) -> Top1 | None:
    """Do the whole plan and return the held-out accuracy; None in all processes but the first, which alone says anything.

    Raises one of the package's own errors, one line each; then nothing is left at `plan.out` but what can be resumed.
    """
    clock = Clock()
    place = runs.find_device(plan.device)
    together = processes(place)
    first = together is None or together.is_main_process
    say, progress = (say, progress) if first else (_nothing, _nothing)
    if first:
        check_folder(plan)
    if plan.photographs:
        check_readable(plan.photographs)
    splits = open_splits(plan.data, plan.held_out, stream=plan.stream, strict=plan.strict)
    say(f"loading {plan.source}")
    with clock("load"):
        pair = _load(plan, len(splits.train.classes))
    check_classes(splits.train, classes(pair.converted))
    Ordered(splits.pictures, plan.train).steps(together.num_processes if together is not None else 1)
    pair.converted.to(together.device if together is not None else place)
    distills = plan.train.distill.logits or plan.train.distill.features
    with clock("calibrate"):
        calibration = _calibrate(plan, pair, say, progress)
    with _folder(plan, first):
        if together is not None:
            together.wait_for_everyone()
        say(f"training on {splits.pictures} pictures of {len(splits.train.classes)} classes")
        with clock("train"):
            result, outcome = classify(
                pair.source, splits, plan.train, plan.out, original=pair.original if distills else None, resume=plan.resume,
                about=_about(plan), say=say, progress=progress,
            )  # fmt: skip
        if not first:
            return None
        if splits.train.skipped:
            say(f"skipped {len(splits.train.skipped)} unreadable: {', '.join(splits.train.skipped)}")
        checkpoint.save(pair.converted, plan.out / "model", overwrite=True)
        runs.write_json(plan.out / "run.json", _written(plan, pair, splits, calibration, result, outcome, clock))
    return outcome.figures


def check_folder(plan: TrainPlan) -> None:
    """Raise `RunError` if what stands at `plan.out` must be neither replaced nor resumed."""
    if plan.resume and plan.overwrite:
        raise runs.RunError("--resume goes on with what --overwrite would remove; give one of them")
    if plan.out.is_dir() and not plan.overwrite and checkpoints.newest(plan.out) is not None:
        if not plan.resume:
            raise runs.RunError(f"{plan.out} holds a run; pass --resume to go on with it, or --overwrite to replace it")
        return
    if not plan.resume or not (plan.out / checkpoints.HISTORY).is_file():
        runs.check_folder(plan.out, plan.overwrite)


def _calibrate(plan: TrainPlan, pair: Pair, say: Say, progress: Progress) -> CalibrationResult | None:
    """Calibrate where there are photographs, unless a checkpoint has what became of it."""
    if not plan.photographs or (plan.resume and checkpoints.newest(plan.out) is not None):
        return None
    pool = crops(pair.source, plan.photographs, plan.calibration, plan.calibration.seed)
    say(f"calibrating {len(record(pair.converted).sites)} sites on {pool.count} crops of {len(pool.paths)} photographs")
    return fit(pair.converted, pool, plan.calibration, progress)


@contextmanager
def _folder(plan: TrainPlan, first: bool) -> Iterator[None]:
    """The run's folder, the old one or a new one, with a history that marks it as a run."""
    if not first or (plan.resume and plan.out.is_dir()):
        yield
        return
    with runs.run_folder(plan.out, plan.overwrite):
        (plan.out / checkpoints.HISTORY).touch()
        yield


def _load(plan: TrainPlan, classes: int) -> Pair:
    """Source and conversion; from scratch, the same weights in every process."""
    if not plan.scratch:
        return load_pair(plan.source, plan.conversion, image_size=plan.image_size)
    with left_alone():
        seed_all(derive(HOST, plan.train.seed))
        return load_pair(plan.source, plan.conversion, image_size=plan.image_size, scratch=classes)


def _about(plan: TrainPlan) -> dict[str, Any]:
    """What `fit` cannot see of a run that is resumed."""
    return {
        "source": plan.source,
        "scratch": plan.scratch,
        "calibration": plan.calibration.model_dump(mode="json") if plan.photographs else None,
        "photographs": [str(path) for path in plan.photographs],
    }


def _written(
    plan: TrainPlan, pair: Pair, splits: Splits, calibration: CalibrationResult | None, result: FitResult, outcome: Outcome,
    clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    """What run.json holds."""
    data = {"train": plan.data, "held_out": plan.held_out or plan.data, "held_out_split": splits.held_out.split}
    about = describe(
        pair.source, pair.converted, plan.calibration if plan.photographs else None, preset=plan.preset, seed=plan.train.seed,
        train=plan.train.model_dump(mode="json"), image_size=pair.source.image_size,
    )  # fmt: skip
    results = {
        "tensors": tensor_counts(pair.converted),
        "calibration": calibration.model_dump(mode="json") if calibration else None,
        "training": result.model_dump(mode="json"),
        "held_out": outcome.figures.model_dump(mode="json"),
        "images": {"train": splits.pictures, "held_out": len(splits.held_out), "skipped": splits.train.skipped},
    }
    asked = {"recipe": plan.recipe, "data": data, "command": list(plan.command)}
    return about | asked | {"seconds": clock.read(), "results": results}
