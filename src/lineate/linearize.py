"""The main job, start to finish: load -> convert -> calibrate (-> train) -> measure fidelity -> time -> draw -> RUN/report.html.

All that can be checked is checked before the first long step. RUN/model is saved as soon as it is calibrated, and stays
whatever happens after, and so do the checkpoints of a training, for --resume; RUN/run.json, written near the end, marks a whole
run and holds what it takes to repeat it.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from lineate import checkpoint, pictures, runs
from lineate.analysis import key_shift
from lineate.calibrate import CalibrationConfig, CalibrationResult, calibrate
from lineate.convert import Conversion, convert, record
from lineate.evaluate import EvaluationError, Progress
from lineate.evaluate.cost import Cost, check_sizes, cost
from lineate.evaluate.fidelity import Fidelity, fidelity
from lineate.evaluate.top1 import compare, prepare, top_k
from lineate.families import detect
from lineate.families.denoiser import Denoiser
from lineate.images import Crops, ImageError, centre_crop, open_image
from lineate.report import render
from lineate.sources import Source, is_denoiser, load_denoiser, load_source
from lineate.train.config import TrainConfig
from lineate.version import __version__

if TYPE_CHECKING:
    from lineate.train.classify import Splits
    from lineate.train.loop import Lesson

SIZES_PX = (224, 448, 672, 1024)  # timed where nothing else is said, each rounded down to whole patches
HELD_OUT_EVERY = 5
HELD_OUT_MOST = 256  # pictures to measure on: each is a forward pass of both models
DRAWN = 4  # held-out pictures shown
CROPS_BATCH = 16
CROP_SCALE, COLOUR_JITTER = (0.08, 1.0), 0.4  # a few photographs must stand for many: docs/calibration.md
REPEATS, SECONDS_PER_SIZE = 11, 15.0  # a size that takes longer is timed three times

Say = Callable[[str], None]


def _nothing(*_: object) -> None:
    """Neither say nor show anything."""


@dataclass(frozen=True)
class Plan:
    """All that `linearize` needs to know. `conversion` is None for a source that is converted already.

    With `data`, labelled images, the model is trained as `train` says once it is calibrated; `held_out_data`, `stream` and
    `strict` are as in `TrainPlan`, and `resume` goes on from the newest checkpoint of that training, or begins.
    Sizes (h, w) and `image_size` are in px; None means the source's own size, and `SIZES_PX`.
    """

    source: str
    photographs: tuple[Path, ...]
    held_out: tuple[Path, ...]
    out: Path
    conversion: Conversion | None
    calibration: CalibrationConfig
    preset: str | None = None
    image_size: int | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    seed: int = 0  # of the crops
    overwrite: bool = False
    device: str = "cpu"
    data: str | None = None
    held_out_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    labels_by_number: bool = False
    train: TrainConfig | None = None
    held_out_data: str | None = None
    stream: int | None = None
    strict: bool = False
    resume: bool = False
    command: tuple[str, ...] = field(default_factory=lambda: tuple(runs.command_line()))


@dataclass(frozen=True)
class Pair:
    """A source, converted, and its original with softmax attention; both on one device, in eval mode."""

    source: Source
    original: nn.Module
    converted: nn.Module


class Clock:
    """Wall-clock seconds of each phase, by name, and of all together."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure what is done inside, and add it to `phase`."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """The seconds of each phase, and "total"."""
        return self.seconds | {"total": time.perf_counter() - self.started}


def split(paths: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """(photographs to calibrate on, photographs held out): of the sorted list every fifth, the first included, is held out.

    Of many held out, `HELD_OUT_MOST` evenly spread ones are kept to measure on; the others are used for nothing.
    """
    ordered = sorted(paths)
    if len(ordered) < 2:
        raise ImageError(f"{len(ordered)} picture cannot be both calibrated on and held out; give more, or --held-out")
    return tuple(path for i, path in enumerate(ordered) if i % HELD_OUT_EVERY), _spread(ordered[::HELD_OUT_EVERY])


def _spread(paths: Sequence[Path]) -> tuple[Path, ...]:
    """At most `HELD_OUT_MOST` of the paths, evenly spread and in their order."""
    return tuple(paths[:: -(-len(paths) // HELD_OUT_MOST) or 1])


def check_readable(paths: Sequence[Path]) -> None:
    """Raise `ImageError` if not one of the pictures can be read; stops at the first that can."""
    reason = "there are none"
    for path in paths:
        try:
            open_image(path)
            return
        except ImageError as error:
            reason = str(error)
    raise ImageError(f"none of the {len(paths)} pictures can be read; the last: {reason}")


def check_images(photographs: Sequence[Path], held_out: Sequence[Path]) -> None:
    """Raise `ImageError` unless both lists have a readable picture and no picture is in both."""
    check_readable(photographs)
    check_readable(held_out)
    if both := {path.resolve() for path in photographs} & {path.resolve() for path in held_out}:
        raise ImageError(f"{min(both)} is both calibrated on and held out; keep the folders of --images and --held-out apart")


def load_pair(
    text: str, conversion: Conversion | None, *, image_size: int | None = None, device: str = "cpu", **options: Any
) -> Pair:
    """Load a source (`options` are `load_source`'s) and convert it; one that is converted already stays as it is.

    The original of that one is built again.
    """
    source = load_source(text, image_size=image_size, **options)
    place = runs.find_device(device)
    source.model.to(place)
    if source.head is not None:
        source.head.to(place)
    check_sizes(source.model, [(source.image_size, source.image_size)])
    if getattr(source.model, "lineate_record", None) is not None:
        return Pair(source, copy.deepcopy(checkpoint.original_of(source.model)), source.model)  # training must not reach it
    original = copy.deepcopy(source.model)
    converted = convert(source.model, conversion or Conversion(), interpolated=source.interpolated)
    if record(converted).conversion.class_token == "drop":  # token by token, the cores are compared with what they stand for
        detect(original).drop_class_token(original)
    return Pair(source, original, converted)


def made_with(train: TrainConfig | None) -> dict[str, Any]:
    """What a training asks of `load_source`."""
    return {} if train is None or train.drop_path is None else {"drop_path": train.drop_path}


def crops(source: Source, photographs: Sequence[Path], config: CalibrationConfig, seed: int) -> Crops:
    """Random crops to calibrate `source` on, as many as the pool holds; of more photographs than that, `seed` draws as many."""
    size, mean, std = source.image_size, source.mean, source.std
    if len(photographs) > config.pool:  # the first ones of a sorted list may be all of one kind
        photographs = [photographs[i] for i in sorted(random.Random(seed).sample(range(len(photographs)), config.pool))]
    return Crops(photographs, size, config.pool, mean=mean, std=std, seed=seed, scale=CROP_SCALE, jitter=COLOUR_JITTER)


def fit(model: nn.Module, pool: Crops, config: CalibrationConfig, progress: Progress) -> CalibrationResult:
    """Calibrate `model` on the crops, in place."""
    return calibrate(model, DataLoader(pool, batch_size=CROPS_BATCH), config=config, progress=progress)


def calibrated(model: nn.Module, pool: Crops, config: CalibrationConfig, progress: Progress) -> dict[str, Any]:
    """Calibrate `model` on the crops, in place; what RUN/calibration.json holds of that: figures, and unreadable photographs."""
    result = fit(model, pool, config, progress)
    skipped = {str(path): reason for path, reason in pool.skipped.items()}
    return {"result": result.model_dump(mode="json"), "skipped": skipped}


def read_calibrated(out: Path) -> dict[str, Any] | None:
    """What came of a calibration before the training at `out`; None if there was none."""
    file = out / runs.CALIBRATED
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def read_held_out(source: Source, paths: Sequence[Path]) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """Centre crops of the pictures that can be read, by path, and the others with the reason. Raises `ImageError` if none can.

    Of many, `HELD_OUT_MOST` evenly spread ones are read at most.
    """
    images: dict[Path, Tensor] = {}
    skipped: dict[Path, str] = {}
    paths = _spread(paths)
    for path in paths:
        try:
            images[path] = centre_crop(path, source.image_size, source.mean, source.std)
        except ImageError as error:
            skipped[path] = str(error)
    if not images:
        raise ImageError(f"none of the {len(paths)} held-out pictures can be read; the first: {skipped[paths[0]]}")
    return images, skipped


def load_timed(text: str, conversion: Conversion | None, device: str) -> tuple[nn.Module, nn.Module]:
    """The original and the converted model of a source, to be timed; weights without a file are drawn, which take as long."""
    named = text.startswith(("timm:", "dit:")) and "@" not in text
    if not is_denoiser(text):
        pair = load_pair(text, conversion, device=device, scratch=1000 if named else None)
        return pair.original, pair.converted
    model = load_denoiser(text, drawn={} if named else None).to(runs.find_device(device))
    if getattr(model, "lineate_record", None) is not None:
        return checkpoint.original_of(model), model
    return copy.deepcopy(model), convert(model, conversion or Conversion())


def choose_sizes(model: nn.Module, sizes: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """The sizes (h, w) in px to time at, checked: where none are said, the only one that the model takes, or `SIZES_PX`.

    Of latents, the model's own, twice and four times that.
    """
    family = detect(model)
    geometry = family.geometry(model)
    own, multiple = geometry.image, max(geometry.patch)
    usual = [(px // multiple * multiple,) * 2 for px in SIZES_PX]
    if own is not None and not geometry.any_size:
        usual = [own]
    elif own is not None and isinstance(family, Denoiser):
        usual = [(times * own[0], times * own[1]) for times in (1, 2, 4)]
    chosen = sizes or usual
    check_sizes(model, chosen)
    return tuple(chosen)


def linearize(plan: Plan, *, say: Say = _nothing, progress: Progress = _nothing) -> Path:
    """Do the whole plan and return the path of the report. `say` gets short lines, `progress` the steps of the long parts.

    Raises one of the package's own errors, one line each; then nothing is left at `plan.out`, unless the model had been
    saved there, which a note on the error says. Ctrl-C likewise.
    """
    clock = Clock()
    runs.check_alone("linearize")
    if plan.data is not None:
        runs.check_resumable(plan.out, plan.overwrite, plan.resume)
        folder = runs.training_folder(plan.out, plan.overwrite, plan.resume)
    else:
        runs.check_folder(plan.out, plan.overwrite)
        folder = runs.run_folder(plan.out, plan.overwrite)
    runs.find_device(plan.device)
    check_images(plan.photographs, plan.held_out)
    say(f"loading {plan.source}")
    with clock("load"):
        options = made_with(plan.train)
        pair = load_pair(plan.source, plan.conversion, image_size=plan.image_size, device=plan.device, **options)
    sizes = choose_sizes(pair.original, plan.sizes)
    held_out, skipped = read_held_out(pair.source, plan.held_out)
    taught = _taught(plan, pair, say)
    with folder:
        pool = crops(pair.source, plan.photographs, plan.calibration, plan.seed)
        with clock("fidelity"):
            before = measure_uncalibrated(pair, list(held_out.values()))
        with clock("calibrate"):
            calibration = _calibrated(plan, pair, pool, say, progress)
        trained = {}
        if taught is not None:
            with clock("train"):
                trained = _train(plan, pair, *taught, say, progress)
            checkpoint.save(pair.converted, plan.out / "model", overwrite=True)
        unread = {str(path): reason for path, reason in skipped.items()} | calibration["skipped"]
        if unread:
            say(f"skipped {len(unread)} unreadable: {', '.join(Path(path).name for path in unread)}")
        say(f"measuring fidelity on {len(held_out)} held-out photographs")
        with clock("fidelity"):
            after = fidelity(pair.original, pair.converted, held_out.values())
        with clock("cost"):
            costs = measure_cost(pair.original, pair.converted, sizes, progress)
        say("drawing")
        with clock("analysis"):
            shift = key_shift(pair.original, held_out.values())
            drawn = draw(plan.out, pair, list(held_out))
        results = {
            "tensors": tensor_counts(pair.converted),
            "sites": record(pair.converted).sites,
            "calibration": calibration["result"],
            "fidelity_before": before.model_dump(mode="json") if before else None,
            "fidelity": after.model_dump(mode="json"),
            "cost": costs.model_dump(mode="json"),
            "key_shift": shift,
            **trained,
            "images": {
                "calibration": len(pool.paths) - len(calibration["skipped"]),
                "held_out": len(held_out),
                "skipped": unread,
            },
        }
        done = {"seconds": clock.read(), "results": results, "pictures": [picture.model_dump() for picture in drawn]}
        config: dict[str, Any] = {"image_size": pair.source.image_size, "sizes": [list(size) for size in sizes]}
        if plan.train is not None:
            config["train"] = plan.train.model_dump(mode="json")
        about = describe(pair.source.name, pair.converted, plan.calibration, preset=plan.preset, seed=plan.seed, **config)
        runs.write_json(plan.out / "run.json", about | {"command": list(plan.command), "data": plan.data} | done)
        return render(plan.out)


def _calibrated(plan: Plan, pair: Pair, pool: Crops, say: Say, progress: Progress) -> dict[str, Any]:
    """Calibrate and save the model; what came of it, and the photographs that could not be read.

    Where a training goes on, its checkpoint holds what became of the model, and RUN/calibration.json what came of it.
    """
    if plan.resume and runs.has_checkpoint(plan.out):
        if (found := read_calibrated(plan.out)) is None:
            name = runs.CALIBRATED
            raise runs.RunError(f"{plan.out} holds no {name}, so linearize did not begin it; resume with train")
        return found
    say(f"calibrating {len(record(pair.converted).sites)} sites on {pool.count} crops of {len(pool.paths)} photographs")
    done = calibrated(pair.converted, pool, plan.calibration, progress)
    checkpoint.save(pair.converted, plan.out / "model", overwrite=plan.resume)
    if plan.data is not None:
        runs.write_json(plan.out / runs.CALIBRATED, done)
    return done


def _taught(plan: Plan, pair: Pair, say: Say) -> tuple[Splits, Lesson] | None:
    """What to train on, with labels as the model counts its classes, and how; None where nothing is trained."""
    if plan.data is None or plan.train is None:
        return None
    from lineate.train.classify import lesson, match, open_splits  # late: what only training needs may not be installed
    from lineate.train.data import Ordered
    from lineate.train.loop import check

    splits = open_splits(
        plan.data, plan.held_out_data, held_out_split=plan.held_out_split, stream=plan.stream, strict=plan.strict,
        image_column=plan.image_column, label_column=plan.label_column,
    )  # fmt: skip
    Ordered(splits.pictures, plan.train).steps(processes=1)
    check(pair.converted, plan.train, plan.out)
    splits = match(splits, pair.converted, by_number=plan.labels_by_number, say=say)
    return splits, lesson(pair.source, splits, plan.train, pair.original)


def _train(plan: Plan, pair: Pair, splits: Splits, taught: Lesson, say: Say, progress: Progress) -> dict[str, Any]:
    """Train the calibrated model, and measure it and its original on what was held out; the results of both."""
    from lineate.train.classify import measure_trained
    from lineate.train.loop import fit as learn

    assert plan.train is not None
    say(f"training on {splits.pictures} pictures of {len(splits.train.classes)} classes")
    about = {
        "source": plan.source,
        "calibration": plan.calibration.model_dump(mode="json"),
        "photographs": [str(path) for path in plan.photographs],
        "seed": plan.seed,
    }
    result = learn(
        pair.converted, taught.batches, taught.objective, plan.train, plan.out, evaluate=taught.evaluate, resume=plan.resume,
        keep_start=True, about=about, say=say, progress=progress,
    )  # fmt: skip
    say(f"measuring both models on {len(splits.held_out)} held-out pictures of split {splits.held_out.split}")
    transform, batch = prepare(pair.source).transform(), plan.train.batch
    before = top_k(pair.original, splits.held_out, transform, batch=batch, workers=plan.train.workers, progress=progress)
    after = measure_trained(pair.converted, pair.source, splits, plan.train, taught)
    if skipped := result.skipped | before.figures.skipped | after.figures.skipped:
        say(f"skipped {len(skipped)} unreadable: {', '.join(skipped)}")
    return {
        "training": result.model_dump(mode="json"),
        "held_out": compare(before, after).model_dump(mode="json"),
    }


def measure_uncalibrated(pair: Pair, images: Sequence[Tensor]) -> Fidelity | None:
    """Fidelity before calibration; None if the activations are not finite then, which is no reason to stop."""
    try:
        return fidelity(pair.original, pair.converted, images)
    except EvaluationError:
        return None


def measure_cost(
    original: nn.Module, converted: nn.Module, sizes: Sequence[tuple[int, int]], progress: Progress, compiled: bool = False
) -> Cost:
    """Both models timed side by side at every size; large ones less often."""
    return cost(
        original, converted, sizes,
        repeats=REPEATS, seconds_per_size=SECONDS_PER_SIZE, compiled=compiled, progress=progress,
    )  # fmt: skip


def draw(folder: Path, pair: Pair, paths: Sequence[Path]) -> list[pictures.Picture]:
    """The run's pictures: features, implicit attention, and saliency for a source with that head."""
    models = {"original": pair.original, "converted": pair.converted}
    shown = paths[:DRAWN]
    drawn = pictures.draw_features(folder, pair.source, models, shown)
    sites = pictures.early_middle_late(record(pair.converted).sites)
    drawn.append(pictures.draw_attention(folder, pair.source, models, sites, paths[0]))
    if pair.source.head is not None:
        drawn += pictures.draw_saliency(folder, pair.source, models, shown)
    return drawn


def analyze(
    text: str, paths: Sequence[Path], out: Path, *, image_size: int | None, device: str, overwrite: bool, say: Say = _nothing
) -> Path:
    """Key shift and implicit attention maps of a source, and of its original if it is converted: `out`/analysis.json.

    Of many pictures, `HELD_OUT_MOST` evenly spread ones are looked at.
    Raises as `linearize` does, and then leaves nothing at `out`.
    """
    runs.check_folder(out, overwrite, runs.ANALYSIS_PARTS)
    place = runs.find_device(device)
    check_readable(paths)
    say(f"loading {text}")
    source = load_source(text, image_size=image_size)
    models = {"original": source.model.to(place)}
    if getattr(source.model, "lineate_record", None) is not None:
        models = {"original": checkpoint.original_of(source.model), "converted": source.model}
    images, skipped = read_held_out(source, paths)
    if skipped:
        say(f"skipped {len(skipped)} unreadable: {', '.join(path.name for path in skipped)}")
    with runs.run_folder(out, overwrite, runs.ANALYSIS_PARTS):
        say(f"looking into {len(images)} photographs")
        shift = {name: key_shift(model, images.values()) for name, model in models.items()}
        sites = pictures.early_middle_late(list(shift["original"]))
        drawn = [pictures.draw_attention(out, source, models, sites, next(iter(images)))]
        runs.write_json(
            out / "analysis.json",
            {
                "lineate": __version__,
                "source": source.name,
                "command": runs.command_line(),
                "created": runs.now(),
                "config": {"image_size": source.image_size},
                "environment": runs.environment(place),
                "images": {"used": len(images), "skipped": {str(path): reason for path, reason in skipped.items()}},
                "key_shift": shift,
                "pictures": [picture.model_dump() for picture in drawn],
            },
        )
    return out / "analysis.json"


def describe(
    source: str, model: nn.Module, calibration: CalibrationConfig | None, *, preset: str | None, seed: int, **config: Any
) -> dict[str, Any]:
    """What it takes to repeat what was done to the converted `model`: the head of every run.json; `config` adds to its own."""
    asked = {"conversion": record(model).conversion.model_dump(mode="json")}
    if calibration is not None:
        asked["calibration"] = calibration.model_dump(mode="json")
    return {
        "lineate": __version__,
        "command": runs.command_line(),
        "created": runs.now(),
        "source": source,
        "preset": preset,
        "seed": seed,
        "config": asked | config,
        "environment": runs.environment(next(model.parameters()).device),
    }


def tensor_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Tensors and parameters of each status in the model's record."""
    done = record(model)
    return {
        status: {"tensors": len(done.names(status)), "parameters": done.count(status)}
        for status in ("inherited", "new", "interpolated", "dropped")
    }
