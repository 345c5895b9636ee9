"""Labelled images: folders with a class per sub-folder, parquet, and hub datasets, through the `datasets` library.

    FOLDER/CLASS/**/picture, FOLDER/{train,val,test}/CLASS/**/picture   classes are the folders of all splits, sorted by name
    FOLDER with *.parquet, FILE.parquet                                 splits as `datasets` finds them in the files' names
    hf:NAME, hf:NAME:CONFIG                                             a dataset of the Hugging Face hub

Class folders are listed, nothing is copied. Of parquet and hub datasets only the split asked for is fetched; `datasets` keeps a
memory-mapped copy of it in its cache, made once and used again by every later run, in the folder that HF_DATASETS_CACHE names;
`open_stream` makes none. Nothing local needs a network.

Pictures are decoded when asked for, as RGB and as stored: like timm and torchvision, and unlike `lineate.images`, a camera's
orientation tag is not applied, so that accuracies compare with theirs. What cannot be decoded is left out or replaced by the
next good picture, and named in the example itself (`Example.skipped`): a DataLoader's workers cannot tell the main process
otherwise. Whoever collates examples passes that to `LabelledImages.note`, so each bad picture counts once, by its name.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lineate.images import SUFFIXES, ImageError, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

FORMS = "a folder with a sub-folder per class, a folder or file of parquet, hf:NAME or hf:NAME:CONFIG"
HELD_OUT = ("validation", "test")  # the splits to evaluate on, the first that is there; many hubs' test splits have no labels
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # `datasets` takes the same words for the same splits


class DataError(ValueError):
    """Labelled images that are not there, or not what they should be; the message names the value and the choices."""


class Example(NamedTuple):
    """A picture with its class. `skipped` says which pictures could not be read on the way to it, and why.

    `image` is None where the picture itself could not be read and no other was put in its place.
    """

    image: Image | None
    label: int
    skipped: dict[str, str]


class _Labelled:
    """What both kinds of data have: the names of the classes in order of label, and which pictures could not be read."""

    def __init__(self, classes: Sequence[str], source: str, split: str, strict: bool) -> None:
        self.classes, self.source, self.split, self.strict = tuple(classes), source, split, strict
        self.skipped: dict[str, str] = {}

    def note(self, skipped: Mapping[str, str]) -> None:
        """Add to `skipped` what examples from workers say of themselves. Raises `DataError` if they say anything, if strict."""
        self.skipped |= skipped
        if self.strict and skipped:
            raise DataError(next(iter(skipped.values())))

    def _decode(self, stored: Mapping[str, Any], name: str | None) -> tuple[Image | None, dict[str, str]]:
        image, skipped = decode_picture(stored, name)
        if get_worker_info() is None:  # an error in a worker would reach the user as a traceback
            self.note(skipped)
        return image, skipped


class LabelledImages(_Labelled, Dataset[tuple[Any, int]]):
    """Labelled images in a fixed order; item i is (RGB picture, label). Open with `open_data`.

    `classes` are their names in order of label; `labels` is (n,) int64; `skipped` maps each picture found unreadable to the
    reason: those met in this process, and what was passed to `note`. It can be pickled, and used in workers.
    """

    def __init__(
        self, images: Any, labels: Tensor, classes: Sequence[str], *, source: str, split: str, strict: bool = False
    ) -> None:
        super().__init__(classes, source, split, strict)
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        image, label, _ = self.take(index)
        assert image is not None
        return image, label

    def read(self, index: int) -> Example:
        """Exactly picture `index`, or an example without a picture; `DataError` then if strict, in workers left to `note`."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        image, skipped = self._decode(self.images[index]["image"], f"{self.split}[{index}]")
        return Example(image, int(self.labels[index]), skipped)

    def ordered(self, classes: Sequence[str]) -> LabelledImages:
        """The same pictures, their labels counted in this order of the same classes."""
        labels = torch.tensor(_numbers(self.classes, classes))[self.labels]
        found = LabelledImages(self.images, labels, classes, source=self.source, split=self.split, strict=self.strict)
        found.skipped = self.skipped
        return found

    def take(self, index: int) -> Example:
        """Picture `index` or else the next one that can be read. Raises `DataError` if none can, and like `read` if strict."""
        skipped: dict[str, str] = {}
        for step in range(len(self)):
            found = self.read((index + step) % len(self) if step else index)
            skipped |= found.skipped
            if found.image is not None:
                return found._replace(skipped=skipped)
        first = next(iter(skipped.values()))
        raise DataError(f"none of the {len(self)} pictures of {self.source} can be read; the first: {first}")

    def limited(self, count: int) -> LabelledImages:
        """`count` of the pictures, evenly spread over all of them (a folder's are sorted by class), or all if there are fewer."""
        if count < 1:
            raise DataError(f"cannot take {count} pictures of {self.source}; at least 1")
        chosen = [i * len(self) // count for i in range(count)] if count < len(self) else list(range(len(self)))
        return LabelledImages(
            self.images.select(chosen),
            self.labels[chosen],
            self.classes,
            source=self.source,
            split=self.split,
            strict=self.strict,
        )


class StreamedImages(_Labelled, IterableDataset[Example]):
    """Labelled images read one after the other, from a hub without keeping them; a picture that cannot be read has no image.

    Workers of a DataLoader share the files of `stream` among them, so the order depends on their number, which must not
    exceed the number of files. `numbers` are what the labels of `stream` become.
    """

    def __init__(
        self,
        stream: Any,
        classes: Sequence[str],
        *,
        source: str,
        split: str,
        strict: bool = False,
        epoch: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(classes, source, split, strict)
        self.stream, self.epoch = stream, epoch
        self.numbers = tuple(range(len(self.classes))) if numbers is None else tuple(numbers)
        stream.set_epoch(epoch)  # every step of `datasets` from stream to stream forgets it

    def __iter__(self) -> Iterator[Example]:
        return map(self.decode, self.stream)

    def decode(self, row: Mapping[str, Any]) -> Example:
        """A row of `stream` as an example; its position there is no name: every worker has its own."""
        image, skipped = self._decode(row["image"], None)
        return Example(image, self.numbers[_checked(row["label"], len(self.classes), self.source)], skipped)

    def ordered(self, classes: Sequence[str]) -> StreamedImages:
        """The same pictures, their labels counted in this order of the same classes."""
        moved = _numbers(self.classes, classes)
        return self._with(classes=classes, numbers=[moved[number] for number in self.numbers])

    def shuffled(self, seed: int, epoch: int, buffer: int = 10_000) -> StreamedImages:
        """Files in random order, and pictures drawn from a buffer of so many; the same for the same seed, epoch and buffer."""
        return self._with(stream=self.stream.shuffle(seed=seed, buffer_size=buffer), epoch=epoch)

    def skip(self, count: int) -> StreamedImages:
        """What comes after the first `count` pictures; those are read, not decoded. For one worker."""
        return self._with(stream=self.stream.skip(count))

    def shard(self, rank: int, world: int) -> StreamedImages:
        """The part of process `rank` of `world`: whole files where they divide evenly, else every `world`-th picture."""
        from datasets.distributed import split_dataset_by_node

        return self._with(stream=split_dataset_by_node(self.stream, rank=rank, world_size=world))

    def _with(self, **changed: Any) -> StreamedImages:
        names = ("stream", "classes", "source", "split", "strict", "epoch", "numbers")
        return StreamedImages(**{name: getattr(self, name) for name in names} | changed)


def open_data(
    source: str | Path,
    *,
    split: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    strict: bool = False,
) -> LabelledImages:
    """The pictures of one split of `source`, in one of the forms of the module docstring.

    `split` is a name, or None for the one to evaluate on: validation, else test, else the only one. A source without splits
    has one, "train". Columns are found by their type where they are not named; labels may be classes, texts or whole numbers.
    With `strict`, a picture that cannot be read is an error when it is met. Raises `DataError`.
    """
    text = str(source)
    folders = {} if text.startswith("hf:") else _class_folders(_local(text))
    if folders:
        name = _choose(tuple(folders), split, text)
        table, image, label = _listed(folders, name), "image", "label"
    else:
        table, name = load_table(text, split, streaming=False)
        image, label = _columns(table.features, image_column, label_column, text)
    if not len(table):
        raise DataError(f"split {name!r} of {text} holds no picture")
    classes, labels = _classes(table.features[label], table[label][:], text)
    return LabelledImages(_undecoded(table, image, label), torch.tensor(labels), classes, source=text, split=name, strict=strict)


def open_stream(
    source: str | Path,
    *,
    split: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    strict: bool = False,
) -> StreamedImages:
    """Like `open_data`, for parquet and hub datasets read in passing. Raises `DataError`, also if the classes have no names."""
    from datasets import ClassLabel

    text = str(source)
    if not text.startswith("hf:") and _class_folders(_local(text)):
        raise DataError(f"{text} is a folder of class folders, which needs no streaming; it streams parquet and hub datasets")
    stream, name = load_table(text, split, streaming=True)
    image, label = _columns(stream.features, image_column, label_column, text)
    if not isinstance(stream.features[label], ClassLabel):
        raise DataError(f"column {label!r} of {text} has no class names, which streaming needs: they would show at the end only")
    classes = stream.features[label].names
    return StreamedImages(_undecoded(stream, image, label), classes, source=text, split=name, strict=strict)


def _local(text: str) -> Path:
    path = Path(text).expanduser()
    if not text or not path.exists():
        raise DataError(f"{text or 'the empty name'} is not there; expected {FORMS}")
    return path


def _canonical(name: str) -> str:
    """train, validation or test for any of their other names; others as they are."""
    return next((split for split, words in _SPLITS.items() if name.lower() in words), name)


def _choose(names: Sequence[str], asked: str | None, source: str) -> str:
    if asked is None:
        found = next((name for name in HELD_OUT if name in names), names[0] if len(names) == 1 else None)
    else:
        found = next((name for name in (asked, _canonical(asked)) if name in names), None)
    if found is None:
        missing = f"no split {asked!r}" if asked is not None else "no split to evaluate on"
        raise DataError(f"{source} has {missing}; choices: {', '.join(names)}")
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(root: Path) -> dict[str, Path]:
    """For each split the folder that holds the class folders; empty if `root` holds no pictures in folders.

    A split's folder holds folders, so a class may be called "train".
    """
    if not root.is_dir():
        return {}
    inside = _subfolders(root)
    splits = {_canonical(path.name): path for path in inside if _canonical(path.name) in _SPLITS and _subfolders(path)}
    found = splits or ({"train": root} if inside else {})
    pictured = any(path.suffix.lower() in SUFFIXES for folder in found.values() for path in folder.glob("*/**/*"))
    return found if pictured else {}


def _listed(folders: Mapping[str, Path], split: str) -> Any:
    """The pictures of one split as a table of paths and classes."""
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table
    from torchvision.datasets.folder import make_dataset

    classes = sorted({path.name for folder in folders.values() for path in _subfolders(folder)})
    numbers = {name: number for number, name in enumerate(classes)}
    found = make_dataset(folders[split], numbers, is_valid_file=_is_picture, allow_empty=True)
    columns = {"image": [path for path, _ in found], "label": [label for _, label in found]}
    return Table.from_dict(columns, features=Features({"image": Value("string"), "label": ClassLabel(names=classes)}))


def _is_picture(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not Path(path).name.startswith(".")


def load_table(source: str, split: str | None, *, streaming: bool) -> tuple[Any, str]:
    """One split of a parquet or hub dataset, and the split's name; the files of other splits are not fetched."""
    import datasets

    try:
        if source.startswith("hf:"):
            name, _, config = source.removeprefix("hf:").partition(":")
            if not name:
                raise DataError(f"no name after hf: in {source!r}; expected {FORMS}")
            builder = datasets.load_dataset_builder(name, config or None)
        elif _local(source).is_dir():
            builder = datasets.load_dataset_builder(str(_local(source).resolve()))
        else:
            builder = datasets.load_dataset_builder("parquet", data_files=str(_local(source).resolve()))
        files = {str(name): found for name, found in (builder.config.data_files or {}).items()}
        chosen = _choose(tuple(files), split, source)
        features = builder.info.features
        only = {chosen: files[chosen]}
        return datasets.load_dataset(builder.name, data_files=only, split=chosen, features=features, streaming=streaming), chosen
    except DataError:
        raise
    except Exception as error:  # whatever the library, the hub's client or a file's reader raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot open {source}: {reason}; expected {FORMS}") from error


def _columns(features: Mapping[str, Any], image: str | None, label: str | None, source: str) -> tuple[str, str]:
    """The names of the column of pictures and that of labels."""
    from datasets import ClassLabel

    images = [name for name, kind in features.items() if holds_pictures(kind)]
    if image is not None and image in features and not _may_hold_pictures(features[image]):
        raise DataError(f"column {image!r} of {source} holds no pictures; choices: {', '.join(images) or 'none'}")
    image = choose_column(image, [images], "pictures", "image_column (--image-column)", features, source)
    rest = {name: kind for name, kind in features.items() if name not in images and name != image}
    if label in features and label not in rest:
        raise DataError(f"column {label!r} of {source} holds pictures, not labels; choices: {', '.join(rest) or 'none'}")
    named = [name for name, kind in rest.items() if isinstance(kind, ClassLabel)]
    others = [name for name, kind in rest.items() if str(getattr(kind, "dtype", "")).lstrip("u").startswith(("int", "string"))]
    usual = [name for name in others if name in ("label", "labels")]
    return image, choose_column(label, [named, usual, others], "labels", "label_column (--label-column)", features, source)


def holds_pictures(kind: Any) -> bool:
    """An image, or what one looks like in parquet that `datasets` did not write."""
    from datasets import Image

    return isinstance(kind, Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _may_hold_pictures(kind: Any) -> bool:
    """Pictures, or what `datasets` makes some of: contents or paths."""
    return holds_pictures(kind) or str(getattr(kind, "dtype", "")).removeprefix("large_") in ("binary", "string")


def choose_column(
    given: str | None, candidates: Sequence[Sequence[str]], what: str, argument: str, columns: Mapping[str, Any], source: str
) -> str:
    """`given`, or the one name in the first list of candidates that is not empty."""
    if given is not None:
        if given not in columns:
            raise DataError(f"{source} has no column {given!r}; choices: {', '.join(columns)}")
        return given
    found = next((names for names in candidates if names), ())
    if len(found) != 1:
        raise DataError(f"{source} has {len(found) or 'no'} columns of {what}; name one with {argument}: {', '.join(columns)}")
    return found[0]


def _classes(kind: Any, labels: Sequence[Any], source: str) -> tuple[Sequence[str], list[int]]:
    """The names of the classes, and each label as a number."""
    from datasets import ClassLabel

    if isinstance(kind, ClassLabel):
        return kind.names, [_checked(label, len(kind.names), source) for label in labels]
    if all(isinstance(label, str) for label in labels):
        names = sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        return names, [numbers[label] for label in labels]
    whole = [label if isinstance(label, int) else -1 for label in labels]
    count = max(whole) + 1
    return [str(number) for number in range(count)], [_checked(label, count, source) for label in whole]


def _checked(label: Any, count: int, source: str) -> int:
    if not isinstance(label, int) or not 0 <= label < count:
        raise DataError(f"a label of {source} is {label!r}, no whole number from 0 to {count - 1}: is this split labelled?")
    return label


def _numbers(before: Sequence[str], after: Sequence[str]) -> list[int]:
    """For each class its place in another order."""
    places = {name: number for number, name in enumerate(after)}
    return [places[name] for name in before]


def _undecoded(table: Any, image: str, label: str) -> Any:
    """The two columns as "image" and "label", pictures as stored: decoding is ours, so that a broken one can be told."""
    from datasets import Image

    table = table.select_columns([image, label])
    names = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return (table.rename_columns(names) if names else table).cast_column("image", Image(decode=False))


def decode_picture(stored: Mapping[str, Any], name: str | None) -> tuple[Image | None, dict[str, str]]:
    """The picture, or None and the reason under the picture's path, else `name`, else its content's checksum."""
    content: bytes | None = stored["bytes"] if stored else None
    path: str | None = stored["path"] if stored else None
    name = path if path and content is None else name or path or f"crc32 {zlib.crc32(content or b''):08x}"
    try:
        if content is None and not path:
            raise ImageError(f"{name} is empty")
        return open_image(io.BytesIO(content) if content is not None else _file(str(path)), name=name, upright=False), {}
    except (ImageError, OSError) as error:
        return None, {name: str(error)}


def _file(path: str) -> Any:
    """What to open: the path itself, or the content of a file of the hub, where streams of class folders point."""
    if "://" not in path:
        return path
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return io.BytesIO(file.read())
