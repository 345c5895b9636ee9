"""Pictures with their captions: folders, parquet and hub datasets, through the `datasets` library.

    FOLDER/NAME.png beside FOLDER/NAME.txt           the caption is the text file's
    FOLDER with metadata.jsonl or metadata.csv       `datasets`' own form: file_name, and a column of captions
    FOLDER with *.parquet, FILE.parquet, hf:NAME, hf:NAME:CONFIG

Pictures are decoded when asked for, as RGB. What cannot be decoded is replaced by the next good picture, with that one's caption,
and noted in `skipped`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from lineate.data import DataError, choose_column, decode_picture, holds_pictures, load_table
from lineate.images import SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image

USUAL = ("text", "caption", "prompt")
FORMS = "a folder of pictures with .txt files or metadata.jsonl beside them, a folder or file of parquet, hf:NAME"


class CaptionedImages(Dataset[tuple[Any, str]]):
    """Pictures and captions in a fixed order. `table[i]["image"]` is a picture as stored. Open with `open_captioned`."""

    def __init__(self, table: Any, captions: Sequence[str], source: str) -> None:
        self.table, self.captions, self.source = table, captions, source
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Image, str]:
        """Picture `index` with its caption, or else the next one that can be read. Raises `DataError` if none can."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        for step in range(len(self)):
            place = (index + step) % len(self)
            image, skipped = decode_picture(self.table[place]["image"], f"picture {place}")
            self.skipped |= skipped
            if image is not None:
                return image, self.captions[place]
        raise DataError(f"none of the {len(self)} pictures of {self.source} can be read: {next(iter(self.skipped.values()))}")

    def first(self, count: int) -> CaptionedImages:
        """The first `count` of them, or all if there are fewer."""
        count = min(count, len(self))
        table = self.table[:count] if isinstance(self.table, list) else self.table.select(range(count))
        return CaptionedImages(table, self.captions[:count], self.source)

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every picture in px, without decoding it; of one that cannot be read (1, 1)."""
        return [_size(row["image"]) for row in self.table]


def open_captioned(source: str | Path, *, split: str = "train", text_column: str | None = None) -> CaptionedImages:
    """The pictures and captions of one split of `source`, in one of the forms of the module docstring. Raises `DataError`.

    The column of captions is the one called text, caption or prompt, or the only one of texts, where it is not named.
    """
    text = str(source)
    if (beside := _beside(Path(text).expanduser())) is not None:
        return beside
    table, name = load_table(text, split, streaming=False)
    pictures = [column for column, kind in table.features.items() if holds_pictures(kind)]
    image = choose_column(None, [pictures], "pictures", "image_column", table.features, text)
    texts = [column for column, kind in table.features.items() if str(getattr(kind, "dtype", "")).endswith("string")]
    usual = [column for column in texts if column in USUAL]
    column = choose_column(text_column, [usual[:1], texts], "captions", "text_column", table.features, text)
    if not len(table):
        raise DataError(f"split {name!r} of {text} holds no picture")
    from datasets import Image as Picture

    images = table.select_columns([image]).rename_columns({image: "image"}) if image != "image" else table.select_columns([image])
    return CaptionedImages(images.cast_column("image", Picture(decode=False)), table[column][:], text)


def _size(stored: Mapping[str, Any]) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as image:
            return image.height, image.width
    except (OSError, ValueError, AttributeError):
        return 1, 1


def _beside(folder: Path) -> CaptionedImages | None:
    """The pictures of a folder that have a text file beside them; None if none has."""
    if not folder.is_dir():
        return None
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    told = [path for path in pictures if path.with_suffix(".txt").is_file()]
    if not told:
        return None
    if len(told) < len(pictures):
        alone = next(path for path in pictures if path not in told)
        raise DataError(f"{len(pictures) - len(told)} pictures of {folder} have no .txt beside them, {alone.name} first")
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in told]
    return CaptionedImages([{"image": {"bytes": None, "path": str(path)}} for path in told], captions, str(folder))
