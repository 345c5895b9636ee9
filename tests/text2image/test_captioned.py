"""Captioned pictures: the same pictures and captions in every form; what cannot be read is replaced and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lineate.data import DataError
from lineate.text2image.captioned import open_captioned

CAPTIONS = {"a": "a red square", "b": "a blue one", "c": "two of them"}


def folder(path: Path) -> Path:
    path.mkdir()
    for index, name in enumerate(CAPTIONS):
        Image.new("RGB", (20 + index, 10), (index * 80, 0, 0)).save(path / f"{name}.png")
    return path


@pytest.fixture(params=["txt", "metadata", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = folder(tmp_path / "pictures")
    if request.param == "txt":
        for name, caption in CAPTIONS.items():
            (made / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8")
    elif request.param == "metadata":
        lines = [json.dumps({"file_name": f"{name}.png", "text": caption}) for name, caption in CAPTIONS.items()]
        (made / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        from datasets import Dataset, Features, Value
        from datasets import Image as Picture

        columns = {"picture": [str(made / f"{name}.png") for name in CAPTIONS], "caption": list(CAPTIONS.values())}
        table = Dataset.from_dict(columns, features=Features({"picture": Picture(), "caption": Value("string")}))
        table.to_parquet(str(tmp_path / "pictures.parquet"))
        return tmp_path / "pictures.parquet"
    return made


def test_every_form_gives_the_same(source: Path) -> None:
    data = open_captioned(source)
    assert [caption for _, caption in data] == list(CAPTIONS.values())
    assert [picture.getpixel((0, 0)) for picture, _ in data] == [(0, 0, 0), (80, 0, 0), (160, 0, 0)]
    assert data.sizes() == [(10, 20), (10, 21), (10, 22)] == [(picture.height, picture.width) for picture, _ in data]


def test_an_unreadable_picture_is_replaced_with_its_caption_and_named(tmp_path: Path) -> None:
    made = folder(tmp_path / "pictures")
    for name, caption in CAPTIONS.items():
        (made / f"{name}.txt").write_text(caption, encoding="utf-8")
    (made / "a.png").write_bytes(b"no picture")
    data = open_captioned(made)
    assert data[0][1] == CAPTIONS["b"]
    assert list(data.skipped) == [str(made / "a.png")]
    assert data.sizes()[0] == (1, 1)


def test_a_picture_without_a_caption_is_an_error(tmp_path: Path) -> None:
    made = folder(tmp_path / "pictures")
    (made / "a.txt").write_text("a red square", encoding="utf-8")
    with pytest.raises(DataError, match=r"2 pictures of .* have no \.txt beside them, b\.png first"):
        open_captioned(made)
