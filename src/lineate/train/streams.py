"""Labelled pictures read in passing, as batches for the loop; nothing is kept on disk.

    epoch e   the stream shuffled by (seed, e), cut among the processes; `pictures` of it in all, since a stream has no length
    step s    the next batch · accumulate rows of each process; the variant of row i is drawn from (seed, e, i, process)

Each process reads its rows itself, and its workers decode them. A picture that cannot be decoded is replaced by the next good
one of its batch. A run that is resumed reads past the rows that came before without decoding them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lineate.data import StreamedImages
from lineate.train import TrainError
from lineate.train.config import TrainConfig
from lineate.train.data import Batch, Ordered, collate, load, train_transform
from lineate.train.randomness import SAMPLE, derive, seed_all

Row = tuple[Mapping[str, Any], tuple[int, int, int]]  # what the stream holds, and (epoch, row, process)
Variant = tuple[Tensor | None, int, dict[str, str]]


class StreamBatches(Ordered):
    """Batches of `pictures` an epoch of a stream, at `size` px for a model with this mean and std.

    Raises `TrainError` for repeated augmentation, and while reading if the stream ends too early.
    """

    def __init__(
        self, data: StreamedImages, config: TrainConfig, pictures: int, *, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(pictures, config)
        if config.augment.repeats != 1:
            raise TrainError(f"augment.repeats: a stream shows each picture once; set it to 1, got {config.augment.repeats}")
        self.data, self.shown = data, {"size": size, "mean": list(mean), "std": list(std)}
        self.variants = _Variants(data, train_transform(config.augment, size, mean, std), config.seed)

    def identity(self) -> dict[str, Any]:
        """Source, split, pictures an epoch and classes, and the pictures' size."""
        data = self.data
        asked = {"source": data.source, "split": data.split, "streamed": self.count, "classes": list(data.classes)}
        return asked | self.shown

    @property
    def skipped(self) -> Mapping[str, str]:
        """As the data say."""
        return self.data.skipped

    def stream(self, start: int, stop: int, process: int, processes: int) -> Iterator[Batch]:
        """The batches of one process; one loader reads on through all epochs."""
        rows = _Rows(self, start, stop, process, processes)
        for batch, skipped in load(self.variants, rows, _replace, self.config.workers):
            self.data.note(skipped)
            if batch is None:
                raise TrainError(f"not one picture of a batch of {self.data.source} can be read: {next(iter(skipped.values()))}")
            yield batch


class _Rows(Sampler[list[Row]]):
    """The batches of one process, undecoded."""

    def __init__(self, batches: StreamBatches, start: int, stop: int, process: int, processes: int) -> None:
        self.batches, self.start, self.stop, self.process, self.processes = batches, start, stop, process, processes

    def __iter__(self) -> Iterator[list[Row]]:
        config, per_epoch = self.batches.config, self.batches.steps(self.processes)
        rows = config.batch * config.accumulate
        for epoch in range(self.start // per_epoch, -(-self.stop // per_epoch)):
            first, last = max(0, self.start - epoch * per_epoch) * rows, min(self.stop - epoch * per_epoch, per_epoch) * rows
            shown = self.batches.data.shuffled(config.seed, epoch).shard(self.process, self.processes).skip(first)
            read = iter(shown.stream)
            for begin in range(first, last, config.batch):
                places = range(begin, begin + config.batch)
                batch = [(row, (epoch, place, self.process)) for place, row in zip(places, read, strict=False)]
                if len(batch) < config.batch:
                    raise TrainError(
                        f"{self.batches.data.source} ended after {begin + len(batch)} pictures for process {self.process}, and "
                        f"an epoch takes {per_epoch * rows}; stream fewer"
                    )
                yield batch


class _Variants(Dataset[Variant]):
    """Rows, decoded and varied; None for a picture that cannot be read."""

    def __init__(self, data: StreamedImages, transform: Any, seed: int) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, item: Row) -> Variant:
        row, key = item
        example = self.data.decode(row)
        seed_all(derive(SAMPLE, self.seed, *key), cuda=False)
        return self.transform(example.image) if example.image is not None else None, example.label, example.skipped


def _replace(variants: list[Variant]) -> tuple[Batch | None, dict[str, str]]:
    """`collate`, with the next good picture, or the first, in the place of each that cannot be read."""
    skipped = {name: reason for _, _, found in variants for name, reason in found.items()}
    if all(image is None for image, _, _ in variants):
        return None, skipped
    whole: list[tuple[Tensor, int, dict[str, str]]] = []
    for i in range(len(variants)):
        image, label, _ = next(one for one in (*variants[i:], *variants) if one[0] is not None)
        assert image is not None
        whole.append((image, label, {}))
    return collate(whole)[0], skipped
