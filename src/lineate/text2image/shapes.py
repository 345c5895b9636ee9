"""Drawn scenes with their captions: a world in which text to image is learned in minutes and judged without error.

Objects of one colour each on black, antialiased: 7 colours, the corners of the RGB cube but black; 4 shapes, or 6. What is said
is GenEval's: "a cross", "a circle and a cross", "three squares", "a red cross", "a cross left of a circle", "a red cross and a
blue circle" (tags single_object, two_object, counting, colors, position, color_attr). What is not said is drawn: colours, places.

    grid     32×32 px, 4 shapes of 7 px, each centred in a cell of a 4×4 grid
    free32   32×32 px, 4 shapes of 7 to 11 px, anywhere
    free64   64×64 px, 6 shapes of 12 to 20 px, anywhere

Held out of training, to ask for what was never seen: shape k in colour k (a red circle, a green square ...), which no training
scene shows, and the ordered pairs of shapes 2k and 2k+1 (a circle and a square ...), which no caption names in this order.
`lineate.evaluate.shapes` finds out what a picture shows. Legend: side of a picture in px, x to the right, y down.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lineate.text2image.prompts import RELATIONS, Clause, Prompt, Relation

COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "cyan": (0, 1, 1), "magenta": (1, 0, 1),
    "white": (1, 1, 1),
}  # fmt: skip
NUMBERS = {2: "two", 3: "three", 4: "four"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Which points (u, v) of the square from -1 to 1 belong to a shape.
_INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) <= 0.88,  # as large to the eye as the circle
    "triangle": lambda u, v: (2 * u.abs() <= v + 1) & (v <= 1),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) <= 1 / 3) & (torch.maximum(u.abs(), v.abs()) <= 1),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.25),
    "diamond": lambda u, v: u.abs() + v.abs() <= 1,
}
_FINE = 8  # points across a pixel that are asked whether they belong
_APART = 3  # px between the boxes of two objects that may be anywhere


class ShapesError(ValueError):
    """A world, tag or prompt that is not there; the message names it and the choices."""


@dataclass(frozen=True)
class World:
    """A kind of scene. `sizes` are the least and the greatest, in px; `cells` a side where places are those of a grid."""

    side: int
    shapes: tuple[str, ...]
    sizes: tuple[int, int]
    cells: int | None = None


_SHAPES = tuple(_INSIDE)
WORLDS = {
    "grid": World(32, _SHAPES[:4], (7, 7), cells=4),
    "free32": World(32, _SHAPES[:4], (7, 11)),
    "free64": World(64, _SHAPES, (12, 20)),
}


@dataclass(frozen=True)
class Drawn:
    """One object: its centre and size in px."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


def find_world(name: str) -> World:
    """The world called `name`. Raises `ShapesError`."""
    if name not in WORLDS:
        raise ShapesError(f"unknown world {name!r}; choices: {', '.join(WORLDS)}")
    return WORLDS[name]


@lru_cache(maxsize=4096)
def stamp(shape: str, size: float, x: float, y: float, side: int) -> Tensor:
    """The share of each pixel that a shape covers, (side, side)."""
    covered = torch.zeros(side, side)
    left, top = (max(0, int(centre - size / 2)) for centre in (x, y))
    part = covered[top : top + int(size) + 2, left : left + int(size) + 2]  # all that the shape can reach
    u, v = (
        ((torch.arange(length * _FINE) + 0.5) / _FINE + start - centre) * 2 / size
        for start, centre, length in ((left, x, part.shape[1]), (top, y, part.shape[0]))
    )
    inside = _INSIDE[shape](u[None, :], v[:, None]).float()
    part[:] = inside.view(part.shape[0], _FINE, part.shape[1], _FINE).mean((1, 3))
    return covered


def draw(scene: Sequence[Drawn], side: int) -> Tensor:
    """The picture of a scene, (3, side, side) in [0, 1]."""
    picture = torch.zeros(3, side, side)
    for thing in scene:
        colour = torch.tensor(COLOURS[thing.colour]).view(3, 1, 1)
        picture = torch.lerp(picture, colour.expand_as(picture).float(), stamp(thing.shape, thing.size, thing.x, thing.y, side))
    return picture


def prompts_of(world: World, tag: str) -> list[Prompt]:
    """Every prompt of a tag. Raises `ShapesError` for an unknown one."""
    pairs = list(permutations(world.shapes, 2))
    match tag:
        case "single_object":
            return [_prompt(tag, f"a {shape}", _of(shape)) for shape in world.shapes]
        case "two_object":
            return [_prompt(tag, f"a {a} and a {b}", _of(a), _of(b)) for a, b in pairs]
        case "counting":
            return [_counting(shape, count) for shape in world.shapes for count in NUMBERS]
        case "colors":
            return [_prompt(tag, f"a {c} {shape}", _of(shape, color=c)) for shape in world.shapes for c in COLOURS]
        case "position":
            return [
                _prompt(tag, f"a {a} {relation} a {b}", _of(b), _of(a, position=(relation, 0)))
                for a, b in pairs for relation in RELATIONS
            ]  # fmt: skip
        case "color_attr":
            return [
                _prompt(tag, f"a {c} {a} and a {d} {b}", _of(a, color=c), _of(b, color=d))
                for a, b in pairs for c, d in permutations(COLOURS, 2)
            ]  # fmt: skip
    raise ShapesError(f"unknown tag {tag!r}; choices: {', '.join(TAGS)}")


def benchmark(world: World, most: int = 48, seed: int = 0) -> list[Prompt]:
    """The prompts to be judged by: of each tag all, or `most` drawn from `seed`; held-out ones among them as they come."""
    chosen = []
    for tag in TAGS:
        prompts = prompts_of(world, tag)
        kept = random.Random(f"{seed}/{tag}").sample(range(len(prompts)), min(most, len(prompts)))
        chosen += [prompts[index] for index in sorted(kept)]
    return chosen


def held_out(world: World, prompt: Prompt) -> bool:
    """Whether a prompt asks for what no training scene shows or no training caption says.

    Raises `ShapesError` for a prompt of another world.
    """
    strange = next((clause.kind for clause in prompt.include if clause.kind not in world.shapes), None)
    if strange is not None or not prompt.include:
        raise ShapesError(f"{prompt.prompt!r} is no prompt of this world, whose shapes are {', '.join(world.shapes)}")
    if any(clause.color is not None and clause.color == held_colour(world, clause.kind) for clause in prompt.include):
        return True
    named = [clause.kind for clause in prompt.include]
    named = named[::-1] if prompt.tag == "position" else named  # its caption begins with what is placed, its clauses do not
    first = world.shapes.index(named[0])
    return len(named) == 2 and first % 2 == 0 and named[1] == world.shapes[first + 1]


def held_colour(world: World, shape: str) -> str:
    """The colour that a shape never has in training."""
    return list(COLOURS)[world.shapes.index(shape)]


def scene_of(world: World, prompt: Prompt, dice: random.Random) -> tuple[Drawn, ...]:
    """A scene that shows the prompt and nothing else; a colour that is not asked for is drawn, and never a held-out one."""
    asked = [(clause.kind, clause.color) for clause in prompt.include for _ in range(clause.count)]
    looks = [(shape, colour or dice.choice([c for c in COLOURS if c != held_colour(world, shape)])) for shape, colour in asked]
    relation = prompt.include[-1].position
    while True:
        places = _places(world, len(looks), dice)
        if places is not None and (relation is None or _clearly(relation[0], places[1], places[0])):
            return tuple(Drawn(*look, *place) for look, place in zip(looks, places, strict=True))


class TrainingScenes(Dataset[tuple[Tensor, str]]):
    """`count` pictures (3, side, side) in [0, 1] with their captions, tags in equal shares and nothing held out shown or said.

    Item i depends on `seed` and i alone.
    """

    def __init__(self, world: World, count: int, seed: int = 0) -> None:
        self.world, self.count, self.seed = world, count, seed
        self.prompts = [[prompt for prompt in prompts_of(world, tag) if not held_out(world, prompt)] for tag in TAGS]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        prompt, scene = self.scene(index)
        return draw(scene, self.world.side), prompt.prompt

    def scene(self, index: int) -> tuple[Prompt, tuple[Drawn, ...]]:
        """What item `index` shows."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        dice = random.Random(f"{self.seed}/{index}")
        prompt = dice.choice(dice.choice(self.prompts))
        return prompt, scene_of(self.world, prompt, dice)


def _prompt(tag: str, text: str, *include: Clause, exclude: tuple[Clause, ...] = ()) -> Prompt:
    return Prompt(tag=tag, include=include, exclude=exclude, prompt=text)


def _of(shape: str, count: int = 1, color: str | None = None, position: tuple[Relation, int] | None = None) -> Clause:
    return Clause(kind=shape, count=count, color=color, position=position)


def _counting(shape: str, count: int) -> Prompt:
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    return _prompt("counting", f"{NUMBERS[count]} {plural}", _of(shape, count), exclude=(_of(shape, count + 1),))


def _places(world: World, count: int, dice: random.Random) -> list[tuple[float, float, float]] | None:
    """Centres and sizes (x, y, size) of objects that do not touch; None if this throw did not find room."""
    places: list[tuple[float, float, float]] = []
    for _ in range(count):
        size = dice.uniform(*world.sizes)
        if world.cells is None:
            reach = size / 2 + 1
            x, y = (dice.uniform(reach, world.side - reach) for _ in range(2))
            clear = all(max(abs(x - a), abs(y - b)) >= (size + other) / 2 + _APART for a, b, other in places)
        else:
            cell = world.side / world.cells
            x, y = ((dice.randrange(world.cells) + 0.5) * cell for _ in range(2))
            # Never in cells side by side, where noise would join two of one colour.
            clear = all(abs(x - a) + abs(y - b) > 1.5 * cell for a, b, _ in places)
        if not clear:
            return None
        places.append((x, y, size))
    return places


def _clearly(relation: Relation, a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether a lies this way of b beyond doubt: at least twice as far along it as across."""
    across, down = a[0] - b[0], a[1] - b[1]
    ways = {"left of": (-across, down), "right of": (across, down), "above": (-down, across), "below": (down, across)}
    along, aside = ways[relation]
    return along >= 2 * abs(aside)
