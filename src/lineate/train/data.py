"""Labelled pictures as batches for the loop: timm's training transforms, repeated augmentation, and an order of its own.

    order of epoch e   a permutation drawn from (seed, e), each picture `repeats` times in a row, cut to the number of pictures
    step s             the next batch · accumulate · processes of them; process r takes the r-th of as many equal parts, so that
                       one process which accumulates over as many batches learns the same, but for rounding
    variant of a picture   drawn from (seed, e, picture, repeat)

What does not fill a last step of an epoch is left out of that epoch. A run that is resumed begins at its step without decoding
what came before. Source of repeated augmentation: Hoffer et al., arXiv 1901.09335, as DeiT's sampler has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL.Image import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import RandomCrop

from lineate.data import LabelledImages
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.kept import PAD_PX, Kept, keep, shift_and_flip, square
from lineate.train.randomness import ORDER, SAMPLE, derive, seed_all


class Batches(Protocol):
    """What the loop learns from: a fixed sequence of batches, of which it can take any part."""

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as JSON."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """The pictures that this process could not read so far, and why."""

    def steps(self, processes: int) -> int:
        """Optimiser steps an epoch."""

    def stream(self, start: int, stop: int, process: int, processes: int) -> Iterator[Any]:
        """The batches of one process for the steps from `start` to `stop`: `config.accumulate` batches a step."""


class Key(NamedTuple):
    """One variant of one picture."""

    epoch: int
    picture: int
    repeat: int


class Batch(NamedTuple):
    """Pictures (B, 3, h, w), normalised, or latents (B, C, h, w), and their classes (B,)."""

    images: Tensor
    labels: Tensor


class Ordered:
    """An order of `count` pictures, drawn anew each epoch, for a run of `config`; what every kind of batches shares."""

    def __init__(self, count: int, config: TrainConfig) -> None:
        self.count, self.config = count, config

    @property
    def skipped(self) -> Mapping[str, str]:
        """None: only what is read from files can be unreadable."""
        return {}

    def steps(self, processes: int) -> int:
        """Whole steps an epoch. Raises `TrainError` if there are too few pictures for one."""
        needed = self.config.batch * self.config.accumulate * processes
        if self.count < needed:
            raise TrainError(
                f"{self.count} pictures do not fill one step of {needed} (batch {self.config.batch} × accumulate "
                f"{self.config.accumulate} × {processes} processes); choose a smaller batch"
            )
        return self.count // needed

    def epoch(self, epoch: int) -> list[Key]:
        """Every variant of an epoch, in order."""
        repeats = self.config.augment.repeats
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(derive(ORDER, self.config.seed, epoch)))
        return [Key(epoch, int(order[i // repeats]), i % repeats) for i in range(self.count)]


class ImageBatches(Ordered):
    """Batches of `data` at `size` px for a model with this mean and std."""

    def __init__(
        self, data: LabelledImages, config: TrainConfig, *, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(len(data), config)
        self.data = data
        self.shown: dict[str, Any] = {"size": size, "mean": list(mean), "std": list(std)}
        self.variants = _Variants(data, train_transform(config.augment, size, mean, std), config.seed)

    def identity(self) -> dict[str, Any]:
        """Source, split, number and classes of the pictures, and their size."""
        data = self.data
        return {"source": data.source, "split": data.split, "pictures": len(data), "classes": list(data.classes)} | self.shown

    @property
    def skipped(self) -> Mapping[str, str]:
        """As the data say."""
        return self.data.skipped

    def stream(self, start: int, stop: int, process: int, processes: int) -> Iterator[Batch]:
        """The batches of one process; one loader reads on through all epochs, unless the pictures are few and hardly varied."""
        order = Order(self, start, stop, process, processes)
        kept = keep(self.data, self.shown["size"]) if self.config.augment.moves_only else None
        return self._loaded(order) if kept is None else self._moved(order, kept)

    def _moved(self, order: Order, kept: Kept) -> Iterator[Batch]:
        mean, std = (torch.tensor(self.shown[name]).view(3, 1, 1) for name in ("mean", "std"))
        for keys in order:
            pixels, labels = kept.take(self.data, [key.picture for key in keys])
            moved = shift_and_flip(pixels, keys, self.config.seed, self.config.augment.flip)
            batch = Batch((moved / 255 - mean) / std, labels)
            yield Batch(*(tensor.pin_memory() for tensor in batch)) if torch.cuda.is_available() else batch

    def _loaded(self, order: Order) -> Iterator[Batch]:
        for batch, skipped in load(self.variants, order, collate, self.config.workers):
            self.data.note(skipped)
            yield batch


def load(variants: Dataset[Any], order: Sampler[Any], collate: Callable[[list[Any]], Any], workers: int) -> Iterator[Any]:
    """The batches that `order` lists, read by `workers` processes."""
    return iter(
        DataLoader(
            variants,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws from torch's own
        )
    )


class Order(Sampler[list[Key]]):
    """The batches of one process as keys."""

    def __init__(self, batches: Ordered, start: int, stop: int, process: int, processes: int) -> None:
        self.batches, self.start, self.stop, self.process, self.processes = batches, start, stop, process, processes

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch, batch = self.batches.steps(self.processes), self.batches.config.batch
        share = batch * self.batches.config.accumulate
        for epoch in range(self.start // per_epoch, -(-self.stop // per_epoch)):
            keys = self.batches.epoch(epoch)
            for step in range(max(self.start, epoch * per_epoch), min(self.stop, (epoch + 1) * per_epoch)):
                first = (step % per_epoch * self.processes + self.process) * share
                yield from (keys[i : i + batch] for i in range(first, first + share, batch))


class _Variants(Dataset[tuple[Tensor, int, dict[str, str]]]):
    """Pictures by key: which variant of a picture it is depends on the key and the seed alone."""

    def __init__(self, data: LabelledImages, transform: Any, seed: int) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int, dict[str, str]]:
        example = self.data.take(key.picture)
        seed_all(derive(SAMPLE, self.seed, *key), cuda=False)
        return self.transform(example.image), example.label, example.skipped


def collate(variants: list[tuple[Tensor, int, dict[str, str]]]) -> tuple[Batch, dict[str, str]]:
    """A batch of pictures (3, h, w) and their classes, and all that could not be read on the way."""
    skipped = {name: reason for _, _, found in variants for name, reason in found.items()}
    return Batch(torch.stack([image for image, _, _ in variants]), torch.tensor([label for _, label, _ in variants])), skipped


def train_transform(augment: Augment, size: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """From a PIL picture to a normalised tensor (3, size, size), varied. Raises `TrainError` for an unknown `auto_augment`."""
    try:
        made = create_transform(
            size,
            is_training=True,
            scale=augment.scale,
            hflip=augment.flip,
            color_jitter=augment.jitter or None,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=augment.erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise TrainError(f"augment.auto_augment: timm does not understand {augment.auto_augment!r}: {error}") from error
    for step in made.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    if augment.crop == "pad":
        made.transforms[:1] = [square(size), RandomCrop(size, padding=PAD_PX)]
    return made


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    """timm's, for no bit at all too: its strongest setting asks for that, and Pillow no longer takes it."""
    if bits < 1:
        return image.point(lambda _: 0)
    found: Image = auto_augment.posterize(image, bits)
    return found
