"""Pictures read in passing: the same from any step on, whoever reads, and an end that comes too early is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from lineate.data import open_stream
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import Batch
from lineate.train.streams import StreamBatches

from .conftest import GREY

Small = Callable[..., TrainConfig]
VARIED = Augment(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5)


@pytest.fixture(scope="module")
def parquet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures in four files, the third of which begins and ends with one that cannot be read."""
    out = tmp_path_factory.mktemp("parquet")
    files = sorted(folder.rglob("*.png"))
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class{i}" for i in range(5)])})
    for number in range(4):
        chosen = files[number::4]
        pictures = [{"bytes": file.read_bytes(), "path": None} for file in chosen]
        if number == 2:
            pictures[0]["bytes"], pictures[-1]["bytes"] = b"no picture", b"nor this"
        labels = [int(file.parent.name[-1]) for file in chosen]
        rows = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows.to_parquet(out / f"train-{number:05d}-of-00004.parquet")
    return out


def batches(parquet: Path, config: TrainConfig, pictures: int = 40) -> StreamBatches:
    stream = open_stream(parquet, split="train")
    return StreamBatches(stream, config, pictures, size=32, mean=GREY, std=GREY)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow  # `datasets` takes some seconds to shuffle a stream, however short
def test_the_stream_from_any_step_is_the_rest_of_the_whole(parquet: Path, small: Small) -> None:
    config = small(augment=VARIED, batch=4)
    whole = list(batches(parquet, config).stream(0, 20, 0, 1))
    assert len(whole) == 20 and not same(whole[:10], whole[10:])
    for start in (3, 11):
        assert same(list(batches(parquet, config).stream(start, 20, 0, 1)), whole[start:])
    helped = batches(parquet, config.model_copy(update={"workers": 2}))
    assert same(list(helped.stream(13, 20, 0, 1)), whole[13:])


def test_two_processes_share_an_epoch_and_unreadable_rows_are_noted(parquet: Path, small: Small) -> None:
    shown: list[torch.Tensor] = []
    skipped: set[str] = set()
    for process in (0, 1):
        made = batches(parquet, small(augment=Augment(scale=(1, 1), flip=0), batch=5))
        for batch in made.stream(0, 4, process, 2):
            shown += list(batch.images)
        skipped |= made.data.skipped.keys()
    assert len(shown) == 40 and len(skipped) == 2
    assert len({image.numpy().tobytes() for image in shown}) == 38


def test_a_batch_of_nothing_readable_is_an_error(parquet: Path, small: Small) -> None:
    with pytest.raises(TrainError, match=r"not one picture of a batch of .* can be read: crc32"):
        list(batches(parquet, small(batch=1)).stream(0, 40, 0, 1))


def test_a_stream_that_ends_too_early_is_an_error(parquet: Path, small: Small) -> None:
    with pytest.raises(TrainError, match="ended after 40 pictures for process 0, and an epoch takes 48; stream fewer"):
        list(batches(parquet, small(), pictures=48).stream(0, 6, 0, 1))


def test_repeats_are_refused(parquet: Path, small: Small) -> None:
    with pytest.raises(TrainError, match=r"augment\.repeats: .* got 3"):
        batches(parquet, small(augment=Augment(repeats=3)))
