"""GenEval's 553 prompts, generated as the paper's own generator does, so that the file is the same byte for byte.

    single_object 80, each class once; two_object 99, counting 80, colors 94, position 100, color_attr 100: 100 draws each,
    less what was drawn before; numpy's default generator, seed 43

Source: Ghosh et al., arXiv 2310.11513 (MIT); the generator read for what it draws, and in which order. Its quirks are kept: every
plural but one ends in s alone, and a person has no colour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lineate.text2image.prompts import RELATIONS, Clause, Prompt, Relation

if TYPE_CHECKING:
    from numpy.random import Generator

# COCO's classes in COCO's order, under GenEval's names.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_SEED, _DRAWS = 43, 100


def geneval_prompts() -> list[Prompt]:
    """The prompts in the published order."""
    import numpy as np

    rng = np.random.default_rng(_SEED)
    order = rng.choice(len(CLASSES), size=len(CLASSES), replace=False)
    drawn = [_prompt("single_object", _a(CLASSES[index]), _of(CLASSES[index])) for index in order]
    makers: tuple[Callable[[Generator], Prompt], ...] = (_two_object, _counting, _colors, _position, _color_attr)
    drawn += [make(rng) for make in makers for _ in range(_DRAWS)]
    return list(dict.fromkeys(drawn))


def _two_object(rng: Generator) -> Prompt:
    a, b = (CLASSES[index] for index in rng.choice(len(CLASSES), size=2, replace=False))
    return _prompt("two_object", f"{_a(a)} and {_a(b)}", _of(a), _of(b))


def _counting(rng: Generator) -> Prompt:
    kind = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    text = f"{_NUMBERS[count]} {kind}{'es' if kind.endswith('s') else 's'}"
    return _prompt("counting", text, _of(kind, count), exclude=(_of(kind, count + 1),))


def _colors(rng: Generator) -> Prompt:
    kind = CLASSES[rng.choice(len(CLASSES) - 1) + 1]
    color = COLORS[rng.choice(len(COLORS))]
    return _prompt("colors", f"{_a(color)} {kind}", _of(kind, color=color))


def _position(rng: Generator) -> Prompt:
    a, b = (CLASSES[index] for index in rng.choice(len(CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    return _prompt("position", f"{_a(a)} {relation} {_a(b)}", _of(b), _of(a, position=(relation, 0)))


def _color_attr(rng: Generator) -> Prompt:
    a, b = (CLASSES[index + 1] for index in rng.choice(len(CLASSES) - 1, size=2, replace=False))
    c, d = (COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False))
    return _prompt("color_attr", f"{_a(c)} {a} and {_a(d)} {b}", _of(a, color=c), _of(b, color=d))


def _prompt(tag: str, text: str, *include: Clause, exclude: tuple[Clause, ...] = ()) -> Prompt:
    return Prompt(tag=tag, include=include, exclude=exclude, prompt=f"a photo of {text}")


def _of(kind: str, count: int = 1, color: str | None = None, position: tuple[Relation, int] | None = None) -> Clause:
    return Clause(kind=kind, count=count, color=color, position=position)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
