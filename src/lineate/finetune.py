"""The other job: load -> convert -> (calibrate) -> train -> measure -> RUN/model; what is learned is the task's to say.

Under `accelerate launch` every process does this with the others; the first alone speaks and writes. All that can be checked is
checked before the first long step. RUN/checkpoints and RUN/history.jsonl stay whatever happens, for --resume; when the run is
whole, RUN/run.json says what it takes to repeat it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lineate import checkpoint, runs
from lineate.evaluate import Progress
from lineate.evaluate.top1 import processes
from lineate.linearize import Clock, _nothing, describe, read_calibrated, tensor_counts
from lineate.tasks import task_of
from lineate.tasks.base import Say, Task, TrainPlan
from lineate.train.loop import FitResult, check, fit


@dataclass(frozen=True)
class Trained:
    """What a training left: where the model is, and the task's figures, if it takes any."""

    model: Path
    figures: Any


def train(plan: TrainPlan, *, say: Say = _nothing, progress: Progress = _nothing) -> Trained | None:
    """Do the whole plan and return what came of it; None in all processes but the first, which alone says anything.

    Raises one of the package's own errors, one line each; then nothing is left at `plan.out` but what can be resumed.
    """
    clock = Clock()
    place = runs.find_device(plan.device)
    together = processes(place)
    first = together is None or together.is_main_process
    say, progress = (say, progress) if first else (_nothing, _nothing)
    if first:
        runs.check_resumable(plan.out, plan.overwrite, plan.resume)
    task = task_of(plan, say)
    say(f"loading {plan.source}")
    with clock("load"):
        task.load()
    task.check(together.num_processes if together is not None else 1)
    task.model.to(together.device if together is not None else place)
    check(task.model, plan.train, plan.out)
    if plan.resume and runs.has_checkpoint(plan.out):  # it has what became of the model
        calibration = read_calibrated(plan.out)
    else:
        with clock("calibrate"):
            calibration = task.calibrate(progress)
    with runs.training_folder(plan.out, plan.overwrite, plan.resume) if first else nullcontext():
        if first and calibration is not None:
            runs.write_json(plan.out / runs.CALIBRATED, calibration)
        if together is not None:
            together.wait_for_everyone()
        with clock("prepare"):
            lesson = task.lesson(together, progress)
        with clock("train"):
            result = fit(
                task.model, lesson.batches, lesson.objective, plan.train, plan.out,
                evaluate=lesson.evaluate, resume=plan.resume, keep_start=bool(plan.photographs), about=_about(plan),
                say=say, progress=progress,
            )  # fmt: skip
        with clock("measure"):
            figures = task.measure()
        if not first:
            return None
        saved = checkpoint.save(task.model, plan.out / "model", overwrite=True)
        runs.write_json(plan.out / "run.json", _written(plan, task, calibration, result, figures, clock))
    return Trained(saved, figures)


def _about(plan: TrainPlan) -> dict[str, Any]:
    """What `fit` cannot see of a run that is resumed."""
    return {
        "source": plan.source,
        "scratch": plan.scratch,
        "calibration": plan.calibration.model_dump(mode="json") if plan.photographs else None,
        "photographs": [str(path) for path in plan.photographs],
        "held_out_split": plan.held_out_split,
        "image_column": plan.image_column,
        "label_column": plan.label_column,
    }


def _read_as(plan: TrainPlan) -> dict[str, Any]:
    """What was said of the data's columns and labels."""
    named = {name: getattr(plan, name) for name in ("image_column", "label_column")}
    return {name: column for name, column in named.items() if column is not None} | (
        {"labels_by_number": True} if plan.labels_by_number else {}
    )


def _written(
    plan: TrainPlan, task: Task, calibration: dict[str, Any] | None, result: FitResult, figures: Any, clock: Clock
) -> dict[str, Any]:
    """What run.json holds."""
    told = task.told(result, figures)
    about = describe(
        task.name, task.model, plan.calibration if plan.photographs else None, preset=plan.preset, seed=plan.train.seed,
        train=plan.train.model_dump(mode="json"), image_size=task.image_size,
    )  # fmt: skip
    results = {
        "tensors": tensor_counts(task.model),
        "calibration": calibration["result"] if calibration else None,
        "training": result.model_dump(mode="json"),
        "held_out": figures.model_dump(mode="json") if figures is not None else None,
        "images": told["images"] | {"skipped": (calibration or {}).get("skipped", {}) | told["images"]["skipped"]},
    }
    asked = {"recipe": plan.recipe, "data": told["data"] | _read_as(plan), "command": list(plan.command)}
    return about | asked | {"seconds": clock.read(), "results": results}
