"""How often a classifier is right: top-1 and top-5 with Wilson's intervals, cross-entropy, and two models on the same images.

    top-k   the share of images whose label is among the k largest logits
    loss    mean cross-entropy, nats an image
    pair    images that only one of two models gets right, with McNemar's exact test; share of equal top-1 predictions

Pictures are prepared as timm's validation does: resized to size / crop_pct, the centre cropped, normalised. What cannot be
decoded is left out of every figure and named. On many processes each takes every world-th image, with as many batches as the
others (what a sharded model needs); the places that this adds at the end count nothing, so each image counts once.

Legend: B batch, n images, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lineate.data import LabelledImages
from lineate.evaluate import EvaluationError, Progress, evaluating
from lineate.families import detect
from lineate.labels import match_classes
from lineate.mixers.base import Frozen
from lineate.sources import Source
from lineate.statistics import Interval, mcnemar, wilson

_K = 5
_ABSENT = -1  # the label of a place without a picture
Item = tuple[int, Tensor, int, dict[str, str]]  # position, picture (3, h, w), label, what could not be read


class Preprocessing(Frozen):
    """What is done to a picture before a model sees it: resized to `image_size / crop_pct` px, cropped, (x - mean) / std."""

    image_size: int
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self) -> Callable[[Any], Tensor]:
        """From an RGB picture to (3, image_size, image_size), through timm."""
        from timm.data import create_transform

        settings = self.model_dump(exclude={"image_size"})
        made: Callable[[Any], Tensor] = create_transform((3, self.image_size, self.image_size), is_training=False, **settings)
        return made


class Top1(Frozen):
    """The figures of one model on one data set; `top5` is None where 5 guesses of K would be all or all but none (K < 6).

    `loss` in nats an image; `skipped` maps each picture that could not be read, and counts in no figure, to the reason.
    """

    images: int
    top1: Interval
    top5: Interval | None
    loss: float
    skipped: dict[str, str]


class Paired(Frozen):
    """Two models on the same images: how many only one of them gets right, and how likely so uneven a split is by chance.

    `agreement` is the share of equal top-1 predictions, `p` that of McNemar's exact test, two-sided.
    """

    original: Top1
    converted: Top1
    agreement: Interval
    only_original: int
    only_converted: int
    p: float


@dataclass(frozen=True)
class Outcome:
    """What a model said of each image: `positions` in the data, `labels` (n,), `guesses` (n, k) best first; and the figures.

    Labels and guesses are places in `classes`.
    """

    positions: Tensor
    labels: Tensor
    guesses: Tensor
    classes: tuple[str, ...]
    figures: Top1

    @property
    def correct(self) -> Tensor:
        """(n,) bool: whether the first guess is right."""
        return self.guesses[:, 0] == self.labels

    def ordered(self, classes: tuple[str, ...]) -> Outcome:
        """The same, counted in this order of the same classes."""
        if classes == self.classes:
            return self
        places = torch.tensor([classes.index(name) for name in self.classes], dtype=self.labels.dtype)
        return replace(self, labels=places[self.labels], guesses=places[self.guesses], classes=classes)


def processes(device: torch.device) -> Any:
    """What `accelerate launch` or `torchrun` started this process as, for `top_k`; None if it runs alone.

    Raises `EvaluationError` for one that was to be several: without GPUs `accelerate launch` starts one, and says nothing.
    """
    if "WORLD_SIZE" not in os.environ and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and device.type == "cpu":
        raise EvaluationError(
            "accelerate launch was asked for several processes and starts one on CPUs; so many do what is theirs by "
            "torchrun --nproc-per-node=N -m lineate ..."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu")


def classes(model: nn.Module) -> int:
    """How many classes a timm or transformers classifier tells apart; 0 for a model without a classifier."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels is not None:  # transformers: every config has it, whether or not the model has a classifier
        return int(labels) if type(model).__name__.endswith("ForImageClassification") else 0
    return int(getattr(model, "num_classes", 0) or 0)


def match(data: LabelledImages, model: nn.Module, *, by_number: bool = False, say: Callable[[str], None]) -> LabelledImages:
    """`data` with labels that count as the classifier's outputs do, see `match_classes`."""
    return match_classes(data, classes(model), detect(model).class_names(model), by_number=by_number, say=say)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(B, K) from a model that returns them, or an output that holds them. Raises `EvaluationError` otherwise."""
    output = model(images)
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise EvaluationError(f"{type(model).__name__} gives no logits (B, K), but a {type(output).__name__}")
    return found


def prepare(source: Source, *, crop_pct: float | None = None) -> Preprocessing:
    """What timm says the model was trained with, and its defaults where it does not say; size, mean and std are the source's.

    Raises `EvaluationError` for a model without a classifier or a crop_pct outside (0, 1].
    """
    from timm.data import resolve_model_data_config

    if not classes(source.model):
        raise EvaluationError(f"{source.name} has no classifier, so there is no accuracy to measure")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise EvaluationError(f"crop_pct is the share of the resized picture that is kept, 0 < crop_pct <= 1, got {crop_pct}")
    found = resolve_model_data_config(source.model)
    return Preprocessing(
        image_size=source.image_size, crop_pct=crop_pct if crop_pct is not None else found["crop_pct"],
        crop_mode=found["crop_mode"], interpolation=found["interpolation"], mean=source.mean, std=source.std,
    )  # fmt: skip


@torch.inference_mode()
def top_k(
    model: nn.Module,
    data: LabelledImages,
    transform: Callable[[Any], Tensor],
    *,
    batch: int = 64,
    workers: int = 0,
    accelerator: Any = None,
    progress: Progress | None = None,
) -> Outcome:
    """Evaluate `model` on every picture of `data`, on the model's device and in its type, in eval mode (restored afterwards).

    `accelerator` is an `accelerate.Accelerator` or `PartialState` where several processes do this together: each of them calls
    this with the same data, and gets the whole outcome. `data.skipped` is brought up to date. Raises `EvaluationError` for
    logits that are not finite or no picture that can be read, `DataError` from data that is strict.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    reference = next(model.parameters())
    items = _Items(data, transform)
    places = range(rank, -(-len(data) // world) * world, world)
    loader = DataLoader(
        items, batch, sampler=places, num_workers=workers, collate_fn=_collate, pin_memory=reference.is_cuda
    )  # fmt: skip
    found: list[Tensor] = []
    losses: list[Tensor] = []
    skipped: dict[str, str] = {}
    with evaluating(model):
        for done, (positions, pictures, labels, unread) in enumerate(loader, start=1):
            scores = logits(model, pictures.to(reference.device, reference.dtype, non_blocking=True)).float().cpu()
            rows, loss = _rows(scores, positions, labels)
            found.append(rows)
            losses.append(loss)
            data.note(unread)
            skipped |= unread
            if progress is not None:
                progress(done, len(loader), "evaluating")
    return _outcome(torch.cat(found), torch.cat(losses), skipped, data, accelerator, reference.device)


def compare(original: Outcome, converted: Outcome) -> Paired:
    """Two outcomes on the same data. Raises `EvaluationError` if they are of different images."""
    if set(converted.classes) == set(original.classes):
        converted = converted.ordered(original.classes)
    same = torch.equal(original.positions, converted.positions) and torch.equal(original.labels, converted.labels)
    if not same:
        sizes = f"{len(original.labels)} and {len(converted.labels)}"
        raise EvaluationError(f"the two models were evaluated on different images ({sizes}), so they cannot be paired")
    a, b = original.correct, converted.correct
    only_original, only_converted = int((a & ~b).sum()), int((b & ~a).sum())
    equal = int((original.guesses[:, 0] == converted.guesses[:, 0]).sum())
    return Paired(
        original=original.figures, converted=converted.figures, agreement=wilson(equal, len(a)),
        only_original=only_original, only_converted=only_converted, p=mcnemar(only_original, only_converted),
    )  # fmt: skip


class _Items(Dataset[Item]):
    """Each picture prepared; a blank one, with no label, in place of what cannot be read and beyond the end."""

    def __init__(self, data: LabelledImages, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Item:
        from PIL import Image

        image, label, skipped = self.data.read(position) if position < len(self.data) else (None, _ABSENT, {})
        if image is None:
            return position, self.transform(Image.new("RGB", (256, 256))), _ABSENT, skipped
        return position, self.transform(image), label, skipped


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, Tensor, dict[str, str]]:
    positions, pictures, labels, unread = zip(*items, strict=True)
    skipped = {name: reason for some in unread for name, reason in some.items()}
    return torch.tensor(positions), torch.stack(pictures), torch.tensor(labels), skipped


def _rows(scores: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For a batch's logits (B, K): position, label and up to 5 guesses of each, (B, 2 + k); and its cross-entropy (B,)."""
    finite = scores.isfinite().all(-1)
    if not finite.all():
        raise EvaluationError(f"the model's logits are not finite, first for picture {int(positions[~finite][0])}")
    if labels.max() >= scores.shape[-1]:
        raise EvaluationError(f"label {int(labels.max())} is beyond the {scores.shape[-1]} classes of the model")
    guesses = scores.topk(min(_K, scores.shape[-1])).indices
    loss = F.cross_entropy(scores, labels, reduction="none", ignore_index=_ABSENT)
    return torch.cat([positions[:, None], labels[:, None], guesses], 1), loss.double()


def _outcome(
    rows: Tensor, losses: Tensor, skipped: dict[str, str], data: LabelledImages, accelerator: Any, device: torch.device
) -> Outcome:
    """All processes' rows together, in order of position, without the places that hold no picture."""
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather, gather_object

        rows, losses = (gather(tensor.to(device)).cpu() for tensor in (rows, losses))
        skipped = {name: reason for some in gather_object([skipped]) for name, reason in some.items()}
    data.skipped |= skipped
    kept = rows[:, 1] != _ABSENT
    if not kept.any():
        first = next(iter(skipped.values()))
        raise EvaluationError(f"none of the {len(data)} pictures of {data.source} can be read; the first: {first}")
    order = rows[kept, 0].argsort()
    positions, labels, guesses = (part[order] for part in (rows[kept, 0], rows[kept, 1], rows[kept, 2:]))
    right = guesses == labels[:, None]
    n = len(labels)
    figures = Top1(
        images=n, top1=wilson(int(right[:, 0].sum()), n),
        top5=wilson(int(right.any(1).sum()), n) if len(data.classes) > _K else None,
        loss=float(losses[kept].mean()), skipped=skipped,
    )  # fmt: skip
    return Outcome(positions, labels, guesses, data.classes, figures)
