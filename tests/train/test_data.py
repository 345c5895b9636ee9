"""The order of the pictures and what is drawn for each: once an epoch over all processes, whatever the workers, from any step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lineate.data import LabelledImages, open_data
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import Batch, ImageBatches, Key, Order, train_transform
from lineate.train.kept import shift_and_flip

from .conftest import GREY, draw_pictures

Small = Callable[..., TrainConfig]
EVERYTHING = Augment(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5, repeats=2)


def batches(pictures: LabelledImages, config: TrainConfig) -> ImageBatches:
    return ImageBatches(pictures, config, size=32, mean=GREY, std=GREY)


def keys(made: ImageBatches, start: int, stop: int, process: int = 0, processes: int = 1) -> list[list[Key]]:
    return list(Order(made, start, stop, process, processes))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_picture_is_seen_once_an_epoch_over_all_processes(pictures: LabelledImages, small: Small, processes: int) -> None:
    made = batches(pictures, small(batch=2, accumulate=2))
    steps = made.steps(processes)
    for epoch in (0, 1):
        seen = Counter(
            key.picture
            for process in range(processes)
            for batch in keys(made, epoch * steps, (epoch + 1) * steps, process, processes)
            for key in batch
        )
        assert set(seen.values()) == {1} and len(seen) == steps * 4 * processes == 40
    assert made.epoch(0) != made.epoch(1)


def test_a_step_has_the_same_batches_on_one_process_as_on_two(pictures: LabelledImages, small: Small) -> None:
    one = keys(batches(pictures, small(batch=4, accumulate=2)), 3, 7)
    both = [keys(batches(pictures, small(batch=4)), 3, 7, process, 2) for process in (0, 1)]
    assert one == [batch for pair in zip(*both, strict=True) for batch in pair]


def test_repeats_stand_in_a_row_and_differ(pictures: LabelledImages, small: Small) -> None:
    made = batches(pictures, small(augment=Augment(repeats=3)))
    assert len(set(made.epoch(0))) == 40
    assert [key.repeat for key in made.epoch(0)[:6]] == [0, 1, 2] * 2
    assert len({key.picture for key in made.epoch(0)[:6]}) == 2
    first, second, _ = made.epoch(0)[:3]
    assert not torch.equal(made.variants[first][0], made.variants[second][0])


def test_the_stream_from_a_step_is_the_rest_of_the_whole_stream(pictures: LabelledImages, small: Small) -> None:
    made = batches(pictures, small(augment=EVERYTHING, batch=4, accumulate=2))
    whole = list(made.stream(0, 10, 0, 1))
    assert same(list(made.stream(7, 10, 0, 1)), whole[14:])


def test_workers_change_nothing(pictures: LabelledImages, small: Small) -> None:
    alone, helped = (batches(pictures, small(augment=EVERYTHING, workers=workers)) for workers in (0, 2))
    assert same(list(alone.stream(3, 8, 0, 1)), list(helped.stream(3, 8, 0, 1)))


def test_a_fresh_pass_does_not_reseed_torch(pictures: LabelledImages, small: Small) -> None:
    """A loader's own seed would come from torch's generator, and move it."""
    made = batches(pictures, small(workers=1))
    before = torch.get_rng_state()
    list(made.stream(0, 1, 0, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_pad_and_crop_moves_the_picture_by_at_most_the_padding(pictures: LabelledImages) -> None:
    picture, _ = pictures[39]
    still = train_transform(Augment(crop="pad", flip=0), 32, GREY, GREY)(picture)
    inner = torch.nn.functional.pad(still, (4, 4, 4, 4), value=-1)
    plain = torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1
    distances = [(inner[:, y : y + 32, x : x + 32] - plain).abs()[:, 4:-4, 4:-4].max() for y in range(9) for x in range(9)]
    assert min(distances) < 1e-6


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_only_moved_are_decoded_once(
    folder: Path, small: Small, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = open_data(folder, split=None), small(augment=Augment(crop="pad", flip=1.0), workers=workers)
    plain = torch.stack([torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1) for picture, _ in data])
    mirrored = torch.nn.functional.pad((plain / 127.5 - 1).flip(-1), (4, 4, 4, 4), value=-1)
    read: list[int] = []
    take = data.take
    monkeypatch.setattr(data, "take", lambda index: read.append(index) or take(index))
    whole = list(batches(data, config).stream(0, 10, 0, 1))
    assert sorted(read) == list(range(40))
    assert same(list(batches(data, config).stream(7, 10, 0, 1)), whole[7:]) and len(read) == 40
    keys_ = [key for chosen in keys(batches(data, config), 0, 10) for key in chosen]
    shown = torch.cat([batch.images for batch in whole])
    assert torch.equal(torch.cat([batch.labels for batch in whole]), data.labels[[key.picture for key in keys_]])
    places = set()
    for key, image in zip(keys_, shown, strict=True):
        shifts = mirrored[key.picture].unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        off = (shifts - image[:, None, None]).abs().amax((0, 3, 4)).flatten()
        assert off.min() < 1e-6
        places.add(int(off.argmin()))
    assert len(places) > 30
    first, second = ([key.picture for key in keys_[part : part + 40]].index(3) + part for part in (0, 40))
    assert not torch.equal(shown[first], shown[second])


def test_flips_are_as_frequent_as_asked(pictures: LabelledImages, small: Small) -> None:
    made = batches(pictures, small(augment=Augment(crop="pad", flip=0.25), epochs=20))
    left = torch.zeros(3, 32, 32, dtype=torch.uint8)
    left[:, :, :16] = 255
    kept = torch.cat([shift_and_flip(left.expand(40, -1, -1, -1), made.epoch(epoch), 0, 0.25) for epoch in range(20)])
    flipped = (kept[:, 0, 16, 26] > 0).float().mean()
    assert 0.18 < float(flipped) < 0.32  # 800 draws: the standard deviation is 0.015


def test_a_corrupt_picture_is_replaced_and_named(tmp_path: Path, small: Small) -> None:
    folder = draw_pictures(tmp_path / "pictures", each=2)
    (folder / "class1" / "0.png").write_bytes(b"no picture")
    for workers in (0, 1):
        data = open_data(folder, split=None)
        made = ImageBatches(data, small(batch=10, workers=workers), size=32, mean=GREY, std=GREY)
        (batch,) = made.stream(0, 1, 0, 1)
        assert batch.images.shape == (10, 3, 32, 32) and len(data.skipped) == 1


def test_too_few_pictures_are_refused(pictures: LabelledImages, small: Small) -> None:
    with pytest.raises(TrainError, match=r"40 pictures do not fill one step of 48 \(batch 8 × accumulate 3 × 2 processes\)"):
        batches(pictures, small(accumulate=3)).steps(2)


@pytest.mark.parametrize("augment", [{"auto_augment": "paint-it-black"}, {"auto_augment": "rand-m9-frobnicate7"}])
def test_an_unknown_augmentation_is_refused(pictures: LabelledImages, small: Small, augment: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"augment\.auto_augment: timm does not understand"):
        batches(pictures, small(augment=augment))


def test_the_strongest_posterize_is_black(pictures: LabelledImages) -> None:
    """timm asks for no bit at all there, which Pillow refuses."""
    made = train_transform(Augment(auto_augment="rand-m10-n1-inc1", flip=0, scale=(1, 1)), 32, GREY, GREY)
    (step,) = [step for step in made.transforms if hasattr(step, "ops")]
    step.ops = [operation for operation in step.ops if operation.name == "PosterizeIncreasing"]
    step.ops[0].prob = 1.0
    assert torch.equal(made(pictures[0][0]), torch.full((3, 32, 32), -1.0))
