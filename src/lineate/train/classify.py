"""Learning classes from labelled images, start to finish: two splits, objective, loop, and top-1 on what was held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lineate.data import DataError, LabelledImages, StreamedImages, check_classes, open_data, open_stream
from lineate.evaluate import Progress
from lineate.evaluate.top1 import Outcome, classes, prepare, processes, top_k
from lineate.sources import Source
from lineate.train.config import TrainConfig
from lineate.train.data import Batches, ImageBatches
from lineate.train.loop import FitResult, fit
from lineate.train.objectives import objective
from lineate.train.streams import StreamBatches


@dataclass(frozen=True)
class Splits:
    """What is learned from, `pictures` of it an epoch, and what is measured on."""

    train: LabelledImages | StreamedImages
    held_out: LabelledImages
    pictures: int


def open_splits(data: str, held_out: str | None = None, *, stream: int | None = None, strict: bool = False) -> Splits:
    """The train split of `data`, and the held-out one of `held_out`, which is `data` where not said.

    With `stream`, so many pictures an epoch are learned from in passing. Raises `DataError` also if the two splits are the same
    or differ in their classes.
    """
    learned: LabelledImages | StreamedImages
    if stream is None:
        learned = open_data(data, split="train", strict=strict)
        pictures = len(learned)
    else:
        learned, pictures = open_stream(data, split="train", strict=strict), stream
    measured = open_data(held_out or data, split=None, strict=strict)
    if (learned.source, learned.split) == (measured.source, measured.split):
        raise DataError(f"{data} has no split to measure on, only {learned.split!r}; give one with --held-out-data")
    if learned.classes != measured.classes:
        raise DataError(f"the classes of {measured.source} are not those of {learned.source}")
    return Splits(learned, measured, pictures)


def classify(
    source: Source,
    splits: Splits,
    config: TrainConfig,
    out: Path,
    *,
    original: nn.Module | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[FitResult, Outcome]:
    """Train the source's model in place, see `fit`, and measure the weights that it ends with on the held-out split.

    Raises `DataError` before anything long if the model has another number of classes, and `TrainError` as `fit` does.
    """
    check_classes(splits.train, classes(source.model))
    transform = prepare(source).transform()
    place = next(source.model.parameters()).device
    shown: dict[str, Any] = {"size": source.image_size, "mean": source.mean, "std": source.std}
    batches: Batches
    if isinstance(splits.train, StreamedImages):
        batches = StreamBatches(splits.train, config, splits.pictures, **shown)
    else:
        batches = ImageBatches(splits.train, config, **shown)

    def measure(model: nn.Module) -> Outcome:
        together = processes(place)
        return top_k(model, splits.held_out, transform, batch=config.batch, workers=config.workers, accelerator=together)

    def evaluate(model: nn.Module) -> dict[str, float]:
        figures = measure(model).figures
        shown = {"top1": figures.top1.value, "test_loss": figures.loss}
        return shown if figures.top5 is None else shown | {"top5": figures.top5.value}

    minimised = objective(config, len(splits.train.classes), original)
    result = fit(
        source.model, batches, minimised, config, out,
        evaluate=evaluate if config.eval_epochs else None, resume=resume, about=about, say=say, progress=progress,
    )  # fmt: skip
    say(f"measuring on {len(splits.held_out)} held-out pictures")
    return result, measure(source.model)
