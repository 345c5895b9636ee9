"""Labels mean what a model's outputs mean: the same pictures score the same whatever order the classes' names stand in."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.data import DataError, open_data, open_stream
from lineate.families import detect
from lineate.labels import check_classes, match_classes

from .tiny import PLAIN

NAMES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(file: Path, names: tuple[str, ...], count: int = 9) -> Path:
    """`count` pictures: number i is of NAMES[i % 3], or what has its place in other names, and is as bright."""
    rows = []
    for i in range(count):
        stored, name = io.BytesIO(), NAMES[i % 3]
        Image.new("RGB", (32, 32), (40 + 80 * (i % 3), 9 * i, 30)).save(stored, "PNG")
        label = names.index(name) if name in names else i % 3
        rows.append({"image": {"bytes": stored.getvalue(), "path": None}, "label": label})
    kind = datasets.ClassLabel(names=list(names))
    schema = datasets.Features({"image": datasets.Image(), "label": kind}).arrow_schema
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file


def done(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lineate")
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lineate")
    assert result.exit_code == 1, result.output
    return str(result.stderr).splitlines()[-1]


def figures(model: Path, data: Path, out: Path, *more: Any) -> dict[str, Any]:
    done("evaluate", model, "--data", data, "--out", out, "--overwrite", *more)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_split_to_measure_on_is_validation_before_test_which_hubs_leave_unlabelled(tmp_path: Path) -> None:
    for split in ("validation", "test"):
        write(tmp_path / "data" / f"{split}.parquet", NAMES, count=6 if split == "test" else 9)
    assert (len(open_data(tmp_path / "data", split=None)), len(open_data(tmp_path / "data", split="test"))) == (9, 6)


def test_columns_and_splits_that_are_named_are_read_and_kept_for_resuming(
    tmp_path: Path, tiny_vit: Callable[..., nn.Module]
) -> None:
    for split in ("train", "validation", "test"):
        file = write(tmp_path / "data" / f"{split}.parquet", NAMES, count=6 if split == "test" else 9)
        table = pq.read_table(file)
        kinds = {
            "image": datasets.Image(),
            "fine": datasets.ClassLabel(names=list(NAMES)),
            "coarse": datasets.ClassLabel(names=["x", "y"]),
        }
        columns = [table["image"], table["label"], pa.array([i % 2 for i in range(len(table))], type=pa.int64())]
        pq.write_table(pa.table(columns, schema=datasets.Features(kinds).arrow_schema), file)
    source = lineate.save(lineate.convert(tiny_vit(num_classes=3)), tmp_path / "source")
    train = ("train", source, "--data", tmp_path / "data", *QUICK, "--out", tmp_path / "run")
    assert "name one with label_column (--label-column): image, fine, coarse" in refused(*train)
    asked = ("--label-column", "fine", "--image-column", "image", "--held-out-split", "test")
    said = done(*train, *asked).stderr
    assert "measuring on 6 held-out pictures" in said and "split test" in said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["held_out_split"] == "test" and run["data"]["label_column"] == "fine"
    assert 'held_out_split was "test" and is null' in refused(*train, *asked[:4], "--resume")
    done(*train, *asked, "--resume")
    evaluate = ("evaluate", tmp_path / "run" / "model", "--data", tmp_path / "data")
    found = done(*evaluate, "--label-column", "fine")
    assert "on 9 pictures" in found.stderr and "split validation" in found.stderr
    assert "has 2 classes (x, y), and the model has 3 classes" in refused(*evaluate, "--label-column", "coarse")


QUICK = ("--set", "train.batch=4", "--set", "train.workers=0", "--set", "train.tracker=none", "--epochs", 1)


def test_a_trained_model_scores_the_same_pictures_the_same_in_any_order_of_their_classes(
    tmp_path: Path, tiny_vit: Callable[..., nn.Module]
) -> None:
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.parquet", NAMES)
    nameless = lineate.save(lineate.convert(tiny_vit(num_classes=3)), tmp_path / "nameless")
    said = done("train", nameless, "--data", tmp_path / "data", *QUICK, "--out", tmp_path / "run").stderr
    assert said.count("taken by number: the model does not name its classes") == 1
    model, other, out = tmp_path / "run" / "model", write(tmp_path / "other.parquet", NAMES[::-1]), tmp_path / "found.json"
    assert json.loads((model / "lineate.json").read_text())["classes"] == list(NAMES)

    plain, turned = (figures(model, data, out)["models"][str(model)] for data in (tmp_path / "data", other))
    assert plain == turned
    wrong = figures(model, other, out, "--labels-by-number")["models"][str(model)]
    assert wrong["loss"] != plain["loss"]
    paired = figures(model, other, out, "--against", nameless)  # which counts its classes as the data do
    assert paired["models"][str(model)] == plain and paired["paired"]["agreement"]["value"] <= 1

    cows = write(tmp_path / "cows.parquet", ("ant", "cow", "bee"))
    assert "'cat' missing, 'cow' in addition; if they stand in the same order all the same" in refused(
        "evaluate", model, "--data", cows
    )
    figures(model, cows, out, "--labels-by-number")
    assert figures(model, cows, out, "--against", nameless, "--labels-by-number")["models"][str(model)]["images"] == 9


def test_going_on_from_a_trained_model_learns_the_same_in_any_order_of_the_classes(
    tmp_path: Path, tiny_vit: Callable[..., nn.Module]
) -> None:
    named = lineate.convert(tiny_vit(num_classes=3))
    detect(named).name_classes(named, NAMES)
    source = lineate.save(named, tmp_path / "named")
    for order, folder in ((NAMES, "a"), (NAMES[::-1], "b")):
        for split in ("train", "test"):
            write(tmp_path / folder / f"{split}.parquet", order)
        done("train", source, "--data", tmp_path / folder, *QUICK, "--out", tmp_path / f"run_{folder}")
    one, other = (lineate.load(tmp_path / f"run_{folder}" / "model").state_dict() for folder in "ab")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("read", [open_data, open_stream])
def test_labels_are_matched_by_name_where_both_sides_have_names(tmp_path: Path, read: Any) -> None:
    said: list[str] = []
    data = read(write(tmp_path / "a.parquet", NAMES), split=None)
    labels = [example.label for example in data] if read is open_stream else data.labels.tolist()
    turned = match_classes(data, 3, ("cat", "ant", "bee"), say=said.append)
    assert turned.classes == ("cat", "ant", "bee") and "matched by name" in said.pop()
    if read is open_stream:
        found = [example.label for example in turned.ordered(NAMES).shard(0, 1).ordered(turned.classes)]
    else:
        found = turned.labels.tolist()
    assert [turned.classes[label] for label in found] == [NAMES[label] for label in labels]
    assert match_classes(data, 3, NAMES, say=said.append) is data and not said
    for names in (None, ("0", "1", "2"), ("a", "b")):
        assert match_classes(data, 3, names, say=said.append) is data and "by number" in said.pop()


def test_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    data = open_data(write(tmp_path / "a.parquet", NAMES), split=None)
    check_classes(data, 3)
    with pytest.raises(DataError, match=r"has 3 classes \(ant, bee, cat\), and the model has 1000 classes"):
        check_classes(data, 1000)
    with pytest.raises(DataError, match="the model has no classifier"):
        check_classes(data, 0)
    with pytest.raises(DataError, match="'dog' missing, 'bee' in addition"):  # a cat is the model's third, and its second
        match_classes(data, 3, ("ant", "cat", "dog"))
    with pytest.raises(DataError, match="'car', 'bus' and 1 more missing"):
        match_classes(data, 3, ("car", "bus", "van"))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("ant", "cat", "cat"), "2 of 3 names are the model's; 'cat' missing, 'bee' in addition"),  # as ImageNet's "crane"
        (("n02219486", "n02206856", "n02121808"), "which one side has for names"),
    ],
)
def test_other_names_at_the_same_numbers_are_said(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    said: list[str] = []
    data = open_data(write(tmp_path / "a.parquet", NAMES), split=None)
    assert match_classes(data, 3, names, say=said.append) is data and reason in said.pop()


def test_models_keep_the_names_where_their_library_would(tmp_path: Path, tiny_vit: Callable[..., nn.Module]) -> None:
    host = transformers.ViTForImageClassification(transformers.ViTConfig(**PLAIN, num_labels=3)).eval()
    family = detect(host)
    assert family.class_names(host) is None  # LABEL_0, LABEL_1 ... are no names
    family.name_classes(host, NAMES)
    lineate.convert(host, "t5").save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    assert family.class_names(again) == NAMES and again.config.label2id["cat"] == 2
    assert family.class_names(lineate.load(lineate.save(host, tmp_path / "lineate"))) == NAMES

    model: Any = tiny_vit(num_classes=3)
    assert detect(model).class_names(model) is None
    model.pretrained_cfg = {"label_names": list(NAMES)}
    assert detect(model).class_names(model) == NAMES
    saved = lineate.load(lineate.save(lineate.convert(model, "softmax"), tmp_path / "timm"))
    assert detect(saved).class_names(lineate.checkpoint.original_of(saved)) == NAMES
