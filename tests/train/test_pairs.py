"""Pairs made ready: pictures of one size together, each batch too; a killed caching goes on; what a step shows is fixed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as Table
from datasets import Image as Picture
from PIL import Image
from safetensors.torch import load_file

from lineate.text2image.autoencoder import to_pixels
from lineate.text2image.captioned import CaptionedImages, open_captioned
from lineate.text2image.pipelines import load_pipeline
from lineate.text2image.texts import encode_texts
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.latents import digest, read_index
from lineate.train.pairs import PairBatches, PairIndex, cache_pairs, expected_bytes, find_sizes, fitted, sizes_near
from lineate.train.rectified import Pairs

CONFIG = TrainConfig(batch=2, augment=Augment(flip=0))
SIZES = [(32, 32)] * 5 + [(24, 42)] * 4 + [(44, 24)] * 2  # height and width


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("shapes")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    folder = tmp_path_factory.mktemp("pictures")
    for index, (height, width) in enumerate(SIZES):
        Image.effect_noise((width, height), 80).convert("RGB").save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"picture {index}", encoding="utf-8")
    return open_captioned(folder)


@pytest.fixture(scope="module")
def cached(pipe: Any, data: CaptionedImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    cache_pairs(data, folder, pipe, side=32, batch=2, per_shard=3)
    return folder


def test_sizes_have_the_area_and_the_aspects_asked_for() -> None:
    sizes = sizes_near(1024, 64)
    assert (1024, 1024) in sizes and all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert all(abs(height * width / 1024**2 - 1) < 0.05 and 1 / 2 <= height / width <= 2 for height, width in sizes)
    assert sorted((width, height) for height, width in sizes) == sorted(sizes)


def test_a_picture_covers_its_size() -> None:
    picture = Image.new("RGB", (50, 20), (255, 0, 0))
    assert fitted(picture, (32, 32)).shape == (3, 32, 32)
    assert bool((fitted(picture, (24, 40))[0] == 255).all())


def test_the_cache_holds_each_picture_once_as_the_pipeline_encodes_it(cached: Path, pipe: Any, data: CaptionedImages) -> None:
    batches = PairBatches(cached, CONFIG)
    places = [(number, row) for number, shard in enumerate(batches.index.shards) for row in range(len(shard.pictures))]
    pictures = [batches.index.shards[number].pictures[row] for number, row in places]
    assert sorted(pictures) == list(range(len(SIZES)))
    assert len(batches.sizes) == 3 and all(len(shard.pictures) <= 3 for shard in batches.index.shards)
    for (number, row), index in zip(places, pictures, strict=True):
        latents, text, pooled = batches.draw(0, number, row)
        picture, caption = data[index]
        size = batches.index.shards[number].size
        expected = pipe.vae.encode(to_pixels(fitted(picture, size))[None]).latent_dist.mean[0]
        torch.testing.assert_close(latents, expected, atol=0.05, rtol=0.01)
        torch.testing.assert_close((text, pooled), tuple(part[0] for part in encode_texts(pipe, [caption])), atol=0.01, rtol=0.01)


def test_what_a_cache_will_take_is_said_before(cached: Path, pipe: Any, data: CaptionedImages, tmp_path: Path) -> None:
    """To the bytes, but for what safetensors writes before them."""
    said: list[str] = []
    cache_pairs(data, tmp_path, pipe, side=32, batch=2, per_shard=3, say=said.append)
    cache_pairs(data, tmp_path, pipe, side=32, batch=2, per_shard=3, say=said.append)
    expected = expected_bytes(read_index(tmp_path, PairIndex), pipe, load_file(tmp_path / "empty.safetensors"))
    files = sorted(tmp_path.glob("0*.safetensors"))
    assert len(files) == len(expected) and all(
        0 < file.stat().st_size - size < 1000 for file, size in zip(files, expected, strict=True)
    )
    total = f"{tmp_path} takes {sum(expected) / 1e3:.1f} kB in 5 files, "
    assert said[0].startswith(f"{total}{sum(expected) / 1e3:.1f} kB in 5 of them still to be made; ")
    assert said[1].startswith(f"{total}all there; ") and said[1].endswith(" GB are free on that disk")


def test_the_first_of_the_pictures_are_a_cache_of_their_own(cached: Path, pipe: Any, data: CaptionedImages) -> None:
    few = data.first(4)
    assert list(few.captions) == list(data.captions)[:4] and few[3][1] == data[3][1] and len(data.first(99)) == len(data)
    table = CaptionedImages(_table(data, 0), ["a", "b", "c"], "table").first(2)
    assert len(table) == 2 and table[1][1] == "b" and table.sizes() == [(32, 32)] * 2
    with pytest.raises(TrainError, match=r"holds a cache of 11 pictures of .*, asked for are 4; give another"):
        cache_pairs(few, cached, pipe, side=32, batch=2, per_shard=3)


@pytest.mark.parametrize("side", [72, 63, 4])
def test_sizes_end_where_the_transformers_positions_end(pipe: Any, side: int) -> None:
    stride, sizes = find_sizes(pipe, 64)
    assert stride == 8 and (64, 64) in sizes and max(map(max, sizes)) == 64
    with pytest.raises(TrainError, match=rf"of about {side}x{side} px; choices: multiples of 8 from 8 to 64, .*max_size 8\)"):
        find_sizes(pipe, side)


def test_caching_goes_on_where_it_stopped(cached: Path, pipe: Any, data: CaptionedImages) -> None:
    files = sorted(cached.glob("0*.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    with pytest.raises(TrainError, match=r"lacks 1 files, 00001\.safetensors first"):
        PairBatches(cached, CONFIG)
    cache_pairs(data, cached, pipe, side=32, batch=2, per_shard=3)
    changed = [file for file in files if file.stat().st_mtime_ns != before[file]]
    assert changed == [files[1]]
    with pytest.raises(TrainError, match="holds another cache: its side is 32"):
        cache_pairs(data, cached, pipe, side=64, batch=2, per_shard=3)


def test_a_cache_is_of_its_pictures_and_captions(cached: Path, pipe: Any, data: CaptionedImages) -> None:
    """A caption changed since, or a picture, makes another; so do the contents of a table that lies on disk."""
    captions = [*data.captions[:-1], "another"]
    with pytest.raises(TrainError, match="before its pictures, labels or captions changed; give another"):
        cache_pairs(CaptionedImages(data.table, captions, data.source), cached, pipe, side=32, batch=2, per_shard=3)
    file = Path(data.table[3]["image"]["path"])
    before, times = digest(data.table, data.captions), file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert digest(data.table, data.captions) != before
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(data.table, data.captions) == before
    on_disk = [_table(data, turned) for turned in (0, 0, 90)]
    one, same, other = (digest(table, ()) for table in on_disk)
    assert one == same != other
    assert digest(on_disk[0].select([2, 0]), ()) != digest(on_disk[0].select([0, 2]), ()) != one


def _table(data: CaptionedImages, turned: int) -> Any:
    """Three pictures as `datasets` has them of parquet, the last turned."""
    rows = []
    for index in range(3):
        content = io.BytesIO()
        data[index][0].rotate(turned * (index == 2)).save(content, format="BMP")  # as long as before
        rows.append({"bytes": content.getvalue(), "path": None})
    return Table.from_dict({"image": rows}).cast_column("image", Picture(decode=False))


def test_batches_are_of_one_size_and_an_epoch_shows_no_picture_twice(cached: Path) -> None:
    batches = PairBatches(cached, CONFIG)
    assert batches.steps(1) == 5  # 5, 4 and 2 pictures in batches of 2
    for epoch in range(3):
        order = batches.epoch(epoch)
        assert all(len({batches.index.shards[number].size for number, _ in batch}) == 1 for batch in order)
        shown = [place for batch in order for place in batch]
        assert len(set(shown)) == len(shown) == 10
    assert batches.epoch(0) != batches.epoch(1)


def test_processes_share_the_batches_and_a_later_start_is_the_tail(cached: Path) -> None:
    batches = PairBatches(cached, CONFIG)
    alone = list(batches.stream(0, 7, 0, 1))
    assert _same(alone[3:], list(batches.stream(3, 7, 0, 1)))
    both = [list(batches.stream(0, 2, process, 2)) for process in (0, 1)]
    assert _same([pair for step in zip(*both, strict=True) for pair in step], alone[:4])


def test_what_would_change_pictures_is_refused(cached: Path) -> None:
    with pytest.raises(TrainError, match=r"set train\.augment\.flip=0"):
        PairBatches(cached, TrainConfig(batch=2))
    with pytest.raises(TrainError, match="a step takes 1 batches of 8 pictures of one size, and there are 4 of 24x40 px, 5 of"):
        PairBatches(cached, CONFIG.model_copy(update={"batch": 8})).steps(1)


def test_the_index_survives_its_file(cached: Path) -> None:
    read = PairIndex.model_validate_json((cached / "index.json").read_text(encoding="utf-8"))
    assert read.model_dump(mode="json") == PairBatches(cached, CONFIG).identity()


def _same(left: list[Pairs], right: list[Pairs]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )
