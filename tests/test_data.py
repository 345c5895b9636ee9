"""Labelled images are what is stored, whatever stores them; a broken one is told, never swallowed; nothing is fetched twice."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lineate.data import DataError, LabelledImages, open_data, open_stream

NAMES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for every test, no progress bars, and no waiting for threads after each pass of a shuffled stream."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


def picture(number: int) -> Image.Image:
    """One that can be told from all others by its first pixel, and that PNG keeps."""
    return Image.new("RGB", (5, 4), (number, 7, 9))


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def number(image: Any) -> int:
    assert image.mode == "RGB" and image.size == (5, 4)
    return int(image.getpixel((0, 0))[0])


def write(file: Path, labels: Sequence[Any], label: Any = None, first: int = 0, content: Callable[[int], bytes] = png) -> Path:
    """A parquet file like the field's: the image a struct of bytes and path, its features in the metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = datasets.ClassLabel(names=list(NAMES)) if label is None else label
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [{"bytes": content(first + i), "path": None} for i in range(len(labels))]
    table = pa.table({"image": images, "label": list(labels)}, schema=features.arrow_schema)
    pq.write_table(table, file, row_group_size=2)
    return file


def folders(root: Path, held: dict[str, list[int]]) -> Path:
    for name, numbers in held.items():
        for one in numbers:
            (root / name).mkdir(parents=True, exist_ok=True)
            picture(one).save(root / name / f"{one:03}.png")
    return root


def held(data: LabelledImages) -> list[tuple[int, str]]:
    return [(number(image), data.classes[label]) for image, label in (data[i] for i in range(len(data)))]


def broken(number: int) -> bytes:
    return b"nonsense" if number in (1, 2) else png(number)


def test_class_folders_with_and_without_splits(tmp_path: Path, cache: Path) -> None:
    flat = folders(tmp_path / "flat", {"bee": [1, 2], "ant": [3]})
    (flat / "bee" / "notes.txt").write_text("no picture")
    (flat / "bee" / ".hidden.png").write_bytes(b"no picture")
    (flat / ".git").mkdir()
    data = open_data(flat, split="train")
    assert held(data) == [(3, "ant"), (1, "bee"), (2, "bee")] and data.labels.tolist() == [0, 1, 1]
    assert held(open_data(flat, split=None)) == held(data)

    split = folders(tmp_path / "split", {"train/ant": [1], "train/cat": [2], "val/cat/deeper": [4], "val/bee": [5]})
    train, val = open_data(split, split="train"), open_data(str(split), split=None)
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert (train.split, val.split, open_data(split, split="val").split) == ("train", "validation", "validation")
    assert held(train) == [(1, "ant"), (2, "cat")] and held(val) == [(5, "bee"), (4, "cat")]
    assert not cache.exists()


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = open_data(folders(tmp_path, {"train": [1], "test": [2], "bus": [3]}), split=None)
    assert held(data) == [(3, "bus"), (2, "test"), (1, "train")]


def test_parquet_files_are_the_splits_of_their_names_and_only_one_is_fetched(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "pets"
    write(folder / "train-00000-of-00002.parquet", [2, 0, 1])
    write(folder / "train-00001-of-00002.parquet", [1], first=3)
    write(folder / "test-00000-of-00001.parquet", [0, 2], first=10)
    data = open_data(folder, split=None)
    assert (data.split, data.classes, held(data)) == ("test", NAMES, [(10, "ant"), (11, "cat")])
    assert [path.name for path in cache.rglob("*.arrow")] == ["parquet-test.arrow"]
    assert held(open_data(folder, split="train")) == [(0, "cat"), (1, "ant"), (2, "bee"), (3, "bee")]
    assert held(open_data(folder / "train-00001-of-00002.parquet", split=None)) == [(3, "bee")]
    hub = f"hf:{folder}"  # the hub's form takes a folder's path for a name
    assert held(open_data(hub, split="test")) == held(data)

    write(folder / "test-00000-of-00001.parquet", [1], first=20)
    assert held(open_data(folder, split=None)) == [(20, "bee")]


def test_labels_are_texts_or_numbers_too(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.parquet", ["cow", "ape", "cow"], datasets.Value("string"))
    assert held(open_data(texts, split=None)) == [(0, "cow"), (1, "ape"), (2, "cow")]
    assert open_data(texts, split=None).classes == ("ape", "cow")
    numbers = write(tmp_path / "numbers.parquet", [3, 0], datasets.Value("int32"))
    assert open_data(numbers, split=None).classes == ("0", "1", "2", "3")
    for labels, kind in (([0, -1], None), ([0, None], datasets.Value("int64")), (["a", None], datasets.Value("string"))):
        unlabelled = write(tmp_path / "unlabelled.parquet", labels, kind)
        with pytest.raises(DataError, match=r"a label of .* is -1, .* labelled\?"):
            open_data(unlabelled, split=None)


def test_columns_are_found_by_type_and_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "two.parquet"
    fine, coarse = datasets.ClassLabel(names=["x", "y"]), datasets.ClassLabel(names=["z"])
    features = datasets.Features({"fine": fine, "img": datasets.Image(), "coarse": coarse, "id": datasets.Value("int64")})
    rows = {"fine": [1], "img": [{"bytes": png(6), "path": "6.png"}], "coarse": [0], "id": [17]}
    pq.write_table(pa.table(rows, schema=features.arrow_schema), file)
    with pytest.raises(DataError, match=r"has 2 columns of labels; name one with label_column .*: fine, img, coarse, id"):
        open_data(file, split=None)
    assert held(open_data(file, split=None, label_column="fine")) == [(6, "y")]
    assert held(open_data(file, split=None, label_column="coarse", image_column="img")) == [(6, "z")]
    with pytest.raises(DataError, match="no column 'picture'; choices: fine, img, coarse, id"):
        open_data(file, split=None, image_column="picture")
    with pytest.raises(DataError, match=r"column 'fine' of .* holds no pictures; choices: img"):
        open_data(file, split=None, image_column="fine")
    with pytest.raises(DataError, match=r"column 'img' of .* holds pictures, not labels; choices: fine, coarse, id"):
        open_data(file, split=None, label_column="img")

    bare = tmp_path / "bare.parquet"  # nothing in it says what the columns are
    pq.write_table(pa.table({"image": [{"bytes": png(8), "path": None}], "label": [0], "id": [5]}), bare)
    assert held(open_data(bare, split=None)) == [(8, "0")]
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"pixels": [png(9)], "label": [0]}), plain)
    with pytest.raises(DataError, match="no columns of pictures"):
        open_data(plain, split=None)
    assert held(open_data(plain, split=None, image_column="pixels")) == [(9, "0")]


def test_what_is_not_there_is_named_with_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere is not there; expected a folder with a sub-folder per class"):
        open_data(tmp_path / "nowhere", split=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot open .*empty"):
        open_data(tmp_path / "empty", split=None)
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"cannot open .*bad\.parquet"):
        open_data(tmp_path / "bad.parquet", split=None)
    both = folders(tmp_path / "both", {"train/ant": [1], "val/ant": [2]})
    with pytest.raises(DataError, match="no split 'test'; choices: train, validation"):
        open_data(both, split="test")
    write(tmp_path / "odd" / "left" / "a.parquet", [0])
    with pytest.raises(DataError, match="no split 'test'; choices: train"):
        open_data(tmp_path / "odd", split="test")
    with pytest.raises(DataError, match="no name after hf: in 'hf:'; expected a folder"):
        open_data("hf:", split="test")
    asked: list[tuple[str, str | None]] = []

    def unreachable(name: str, config: str | None) -> None:
        asked.append((name, config))
        raise ConnectionError("Couldn't reach it on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    for opened in (open_data, open_stream):
        with pytest.raises(DataError, match="cannot open hf:some/thing:part: Couldn't reach it on the Hub; expected a folder"):
            opened("hf:some/thing:part", split="test")
    assert asked == [("some/thing", "part")] * 2


def test_a_broken_picture_gives_way_to_the_next_and_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [0, 1, 2, 0], content=broken)
    data = open_data(file, split=None)
    assert [number(data[i][0]) for i in range(4)] == [0, 3, 3, 3] and [data[i][1] for i in range(4)] == [0, 0, 0, 0]
    assert sorted(data.skipped) == ["train[1]", "train[2]"] and "cannot be read" in data.skipped["train[1]"]
    example = data.take(1)
    assert (example.label, sorted(example.skipped)) == (0, ["train[1]", "train[2]"])
    exact = data.read(1)
    assert (exact.image, exact.label, list(exact.skipped)) == (None, 1, ["train[1]"])
    with pytest.raises(IndexError):
        data[4]
    with pytest.raises(DataError, match=r"train\[1\] cannot be read as a picture: it is in no format that Pillow knows$"):
        open_data(file, split=None, strict=True).take(1)
    none = open_data(write(tmp_path / "none.parquet", [0, 0], content=lambda i: b"nonsense"), split=None)
    with pytest.raises(DataError, match=r"none of the 2 pictures of .* can be read; the first: train\[1\]"):
        none.take(1)


def test_a_broken_file_is_named_by_its_path(tmp_path: Path) -> None:
    root = folders(tmp_path, {"ant": [1], "bee": [2]})
    cut = root / "ant" / "001.png"
    cut.write_bytes(cut.read_bytes()[:40])
    data = open_data(root, split=None)
    assert number(data[0][0]) == 2 and list(data.skipped) == [str(cut)]


def test_pictures_are_as_stored_whatever_their_mode_and_turn(tmp_path: Path) -> None:
    turned = Image.new("RGB", (5, 4), (3, 7, 9))
    tag = turned.getexif()
    tag[0x0112] = 6  # a quarter turn
    (tmp_path / "ant").mkdir()
    turned.save(tmp_path / "ant" / "a.png", exif=tag)
    Image.new("LA", (5, 4), (3, 128)).save(tmp_path / "ant" / "b.png")
    data = open_data(tmp_path, split=None)
    assert [number(image) for image, _ in (data[0], data[1])] == [3, 3]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.slow
def test_workers_read_the_same_and_their_skips_come_back(tmp_path: Path, context: str) -> None:
    data = open_data(write(tmp_path / "a.parquet", [0, 1, 2, 0, 1], content=broken), split=None)
    loader = DataLoader(data, 2, collate_fn=list, num_workers=2, multiprocessing_context=context)
    assert [number(image) for batch in loader for image, _ in batch] == [0, 3, 3, 3, 4]
    assert data.skipped == {}  # a worker's own copy knows; `take` is what tells
    alone = [data.take(i) for i in range(5)]
    reached = pickle.loads(pickle.dumps(alone))
    again = open_data(tmp_path / "a.parquet", split=None)
    for example in reached:
        again.note(example.skipped)
    assert sorted(again.skipped) == ["train[1]", "train[2]"]


def test_a_copy_reads_the_same(tmp_path: Path) -> None:
    for source in (write(tmp_path / "a.parquet", [0, 1, 2]), folders(tmp_path / "f", {"ant": [4], "bee": [5]})):
        data = open_data(source, split=None)
        assert held(pickle.loads(pickle.dumps(data))) == held(data)


def test_a_limit_spreads_over_all(tmp_path: Path) -> None:
    data = open_data(folders(tmp_path, {"ant": [0, 1, 2, 3], "bee": [4, 5, 6, 7]}), split=None)
    assert held(data.limited(4)) == [(0, "ant"), (2, "ant"), (4, "bee"), (6, "bee")]
    assert held(data.limited(100)) == held(data)
    assert data.limited(3).labels.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match="cannot take 0 pictures"):
        data.limited(0)


def streamed(stream: Any) -> list[int]:
    return [number(example.image) for example in stream]


def test_a_stream_holds_the_same_and_shuffles_by_seed_and_epoch(tmp_path: Path, cache: Path) -> None:
    for shard in range(4):
        write(tmp_path / "pets" / f"train-{shard:05}-of-00004.parquet", [0, 1, 2, 0, 1], first=5 * shard)
    stream = open_stream(tmp_path / "pets", split="train")
    assert streamed(stream) == list(range(20)) and stream.classes == NAMES
    assert not list(cache.rglob("*.arrow"))
    orders = {key: streamed(stream.shuffled(*key, buffer=8)) for key in ((0, 0), (0, 1), (1, 0))}
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 3
    assert streamed(stream.shuffled(0, 1, buffer=8)) == orders[0, 1]
    assert streamed(stream.shuffled(0, 1, buffer=8).skip(7)) == orders[0, 1][7:]
    for world in (2, 3):
        parts = [streamed(stream.shuffled(0, 1, buffer=8).shard(rank, world)) for rank in range(world)]
        assert parts != [sorted(part) for part in parts] and sorted(one for part in parts for one in part) == list(range(20))
    loader = DataLoader(stream, 3, collate_fn=list, num_workers=2)
    assert sorted(number(example.image) for batch in loader for example in batch) == list(range(20))


def test_a_stream_tells_what_is_broken_too(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [0, 1, 2, 0], content=broken)
    stream = open_stream(file, split=None)
    assert [example.image is None for example in stream] == [False, True, True, False]
    assert len(stream.skipped) == 1 and "crc32" in next(iter(stream.skipped))  # the two hold the same bytes
    with pytest.raises(DataError, match="crc32"):
        list(open_stream(file, split=None, strict=True))
    with pytest.raises(DataError, match="has no class names"):
        open_stream(write(tmp_path / "texts.parquet", ["a"], datasets.Value("string")), split=None)
    with pytest.raises(DataError, match="needs no streaming"):
        open_stream(folders(tmp_path / "f", {"ant": [1], "bee": [2]}), split=None)


def test_strict_data_stops_the_process_that_collates(tmp_path: Path) -> None:
    data = open_data(write(tmp_path / "a.parquet", [0, 1], content=broken), split=None, strict=True)
    with pytest.raises(DataError, match="told by a worker"):
        data.note({"train[1]": "told by a worker"})
    data.note({})


def test_labels_and_pictures_stay_together(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 40).tolist()
    data = open_data(write(tmp_path / "a.parquet", labels), split=None)
    assert torch.equal(data.labels, torch.tensor(labels))
    assert held(data) == [(i, NAMES[label]) for i, label in enumerate(labels)]
