"""Learning classes from labelled images: two splits, the lesson for the loop, and top-1 on what was held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lineate.data import DataError, LabelledImages, StreamedImages, open_data, open_stream
from lineate.evaluate.top1 import Outcome, classes, prepare, processes, top_k
from lineate.families import detect
from lineate.labels import check_classes, difference, is_numbered, match_classes
from lineate.sources import Source
from lineate.train.config import TrainConfig
from lineate.train.data import Batches, ImageBatches
from lineate.train.loop import Lesson
from lineate.train.objectives import objective
from lineate.train.streams import StreamBatches


@dataclass(frozen=True)
class Splits:
    """What is learned from, `pictures` of it an epoch, and what is measured on."""

    train: LabelledImages | StreamedImages
    held_out: LabelledImages
    pictures: int


def open_splits(
    data: str, held_out: str | None = None, *, held_out_split: str | None = None, stream: int | None = None, **options: Any
) -> Splits:
    """The train split of `data`, and the held-out one of `held_out`, which is `data` where not said; `options` are `open_data`'s.

    With `stream`, so many pictures an epoch are learned from in passing. Raises `DataError` also if the two splits are the same
    or differ in their classes.
    """
    learned: LabelledImages | StreamedImages
    if stream is None:
        learned = open_data(data, split="train", **options)
        pictures = len(learned)
    else:
        learned, pictures = open_stream(data, split="train", **options), stream
    measured = open_data(held_out or data, split=held_out_split, **options)
    if (learned.source, learned.split) == (measured.source, measured.split):
        raise DataError(f"{data} has no split to measure on, only {learned.split!r}; give one with --held-out-data")
    if different := difference(learned.classes, measured.classes):
        raise DataError(f"the classes of {measured.source} are not those of {learned.source}: {different}")
    return Splits(learned, measured.ordered(learned.classes), pictures)


def match(
    splits: Splits, model: nn.Module, *, drawn: bool = False, by_number: bool = False, say: Callable[[str], None]
) -> Splits:
    """`splits` with labels that count as the model's outputs do, see `match_classes`; the model keeps their names from then on.

    The outputs of a model whose weights are `drawn` stand for nothing yet.
    """
    family = detect(model)
    names = splits.train.classes if drawn else family.class_names(model)
    matched = match_classes(splits.train, classes(model), names, by_number=by_number, say=say)
    if not is_numbered(matched.classes):
        family.name_classes(model, matched.classes)
    return Splits(matched, splits.held_out.ordered(matched.classes), splits.pictures)


def lesson(source: Source, splits: Splits, config: TrainConfig, original: nn.Module | None = None) -> Lesson:
    """What the source's model is to learn, from `original` too where the config distils.

    Raises `DataError` if the model has another number of classes, and `TrainError` if the config does not fit.
    """
    check_classes(splits.train, classes(source.model))
    shown: dict[str, Any] = {"size": source.image_size, "mean": source.mean, "std": source.std}
    batches: Batches
    if isinstance(splits.train, StreamedImages):
        batches = StreamBatches(splits.train, config, splits.pictures, **shown)
    else:
        batches = ImageBatches(splits.train, config, **shown)

    minimised = objective(config, len(splits.train.classes), original)
    return Lesson(batches, minimised, HeldOut(source, splits, config) if config.eval_epochs else None)


class HeldOut:
    """Top-1 on what is held out, of a model in training; `last` is what was measured last, None before."""

    def __init__(self, source: Source, splits: Splits, config: TrainConfig) -> None:
        self.source, self.splits, self.config = source, splits, config
        self.last: Outcome | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Figures for the history."""
        self.last = measure(model, self.source, self.splits, self.config)
        figures = self.last.figures
        found = {"top1": figures.top1.value, "test_loss": figures.loss}
        return found if figures.top5 is None else found | {"top5": figures.top5.value}


def measure_trained(model: nn.Module, source: Source, splits: Splits, config: TrainConfig, taught: Lesson) -> Outcome:
    """`measure` of a trained model, or what the loop measured at its end where that was the very same.

    Unmerged LoRA and other precisions round otherwise, and a run that was resumed at its end measured nothing.
    """
    same = config.precision == "no" and config.protocol != "lora"
    last = taught.evaluate.last if same and isinstance(taught.evaluate, HeldOut) else None
    return last or measure(model, source, splits, config)


def measure(model: nn.Module, source: Source, splits: Splits, config: TrainConfig) -> Outcome:
    """Top-1 on the held-out split of `model`, which is the source's or one in training, by all processes together."""
    together, transform = processes(next(source.model.parameters()).device), prepare(source).transform()
    return top_k(model, splits.held_out, transform, batch=config.batch, workers=config.workers, accelerator=together)
