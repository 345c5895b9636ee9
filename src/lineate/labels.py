"""Whether the labels of data mean what the outputs of a model mean: by the classes' names where both have them, else by number.

    names of data     its class folders, a column's class names, or its texts; whole numbers have none: 0, 1, 2 ...
    names of a model  those that it was trained on, kept in `lineate.json`; `id2label` of transformers; `label_names` of timm

Of two orders of the same names neither is wrong, so the data's labels are counted in the model's. Other names are refused: a
model of cats answers nothing about cars. Yet the same classes may have other names: ImageNet's have WordNet's numbers in folders,
which no words can be compared with, and words elsewhere, of which a few differ while the others stand at the same number. Both
are taken by number, and said; of whatever is refused a user may still say that numbers are enough.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lineate.data import DataError, LabelledImages, StreamedImages

Data = TypeVar("Data", LabelledImages, StreamedImages, LabelledImages | StreamedImages)


def check_classes(data: LabelledImages | StreamedImages, model_classes: int) -> None:
    """Raise `DataError` unless a model with this many classes (0: no classifier) fits the data."""
    if model_classes != len(data.classes):
        has = f"{model_classes} classes" if model_classes else "no classifier"
        few = ", ".join(data.classes[:3]) + (", ..." if len(data.classes) > 3 else "")
        raise DataError(f"{data.source} has {len(data.classes)} classes ({few}), and the model has {has}")


def match_classes(
    data: Data,
    model_classes: int,
    names: Sequence[str] | None,
    *,
    by_number: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Data:
    """`data` with labels that count as the model's outputs do; unless the names are equal, `say` is told how that was found.

    `names` are what the outputs stand for, None where the model does not say. Raises `DataError` for another number of classes,
    and for other names (none in common, or one at another number), unless `by_number`.
    """
    check_classes(data, model_classes)
    if names is None or len(names) != model_classes:  # a head may have been replaced since it was named
        say(f"labels of {data.source} are taken by number: the model does not name its classes")
        return data
    different = difference(names, data.classes)
    if tuple(names) == data.classes:
        return data
    if not different and not by_number:
        say(f"labels of {data.source} are matched by name: the model has the same classes in another order")
        return data.ordered(names)
    if by_number or _unspoken(names) or _unspoken(data.classes):
        say(f"labels of {data.source} are taken by number, {'as asked' if by_number else 'which one side has for names'}")
        return data
    same = [name for name, other in zip(data.classes, names, strict=True) if name == other]
    if same and not set(data.classes).difference(same) & set(names):
        say(f"labels of {data.source} are taken by number: {len(same)} of {model_classes} names are the model's; {different}")
        return data
    raise DataError(
        f"the classes of {data.source} are not the model's: {different}; if they stand in the same order all the same, pass "
        "--labels-by-number"
    )


def is_numbered(classes: Sequence[str]) -> bool:
    """Whether the names are only what labels without names are called: 0, 1, 2 ..."""
    return list(classes) == [str(number) for number in range(len(classes))]


def _unspoken(classes: Sequence[str]) -> bool:
    """Whether the names are no words: numbers, or WordNet's (n01440764)."""
    return is_numbered(classes) or all(re.fullmatch(r"n\d{8}", name) for name in classes)


def difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """The names that only one of the two has, in words; nothing if both have the same, in whatever order."""
    missing, added = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    parts = ([f"{_few(missing)} missing"] if missing else []) + ([f"{_few(added)} in addition"] if added else [])
    return ", ".join(parts)


def _few(names: Mapping[str, int]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:2]) + (f" and {len(listed) - 2} more" if len(listed) > 2 else "")
