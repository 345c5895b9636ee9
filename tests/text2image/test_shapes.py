"""Drawn scenes are what they say; the rules that judge them find exactly what was drawn, clean, noisy or blurred."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lineate.evaluate import EvaluationError
from lineate.evaluate.rules import Found
from lineate.evaluate.shapes import UNKNOWN, detect, judge
from lineate.text2image.prompts import Prompt
from lineate.text2image.shapes import (
    COLOURS,
    TAGS,
    WORLDS,
    Drawn,
    ShapesError,
    TrainingScenes,
    benchmark,
    draw,
    find_world,
    held_out,
    prompts_of,
    scene_of,
    stamp,
)  # fmt: skip

GRID = WORLDS["grid"]


def blurred(picture: Tensor) -> Tensor:
    """By a Gaussian of 0.7 px; beyond the picture is background."""
    taps = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * 0.7**2))
    rows = torch.nn.functional.conv2d(picture[:, None], (taps / taps.sum()).view(1, 1, 1, 7), padding=(0, 3))
    return torch.nn.functional.conv2d(rows, (taps / taps.sum()).view(1, 1, 7, 1), padding=(3, 0))[:, 0]


def shown(found: list[Found]) -> Counter[tuple[str, str | None]]:
    return Counter((thing.kind, thing.color) for thing in found)


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_drawn_is_found_and_is_exactly_the_prompt(name: str) -> None:
    world = WORLDS[name]
    training = TrainingScenes(world, 40, seed=1)
    items = [training.scene(index) for index in range(40)]
    clean = torch.stack([draw(scene, world.side) for _, scene in items])
    for pictures in (clean, torch.stack([blurred(picture) for picture in clean])):
        for (prompt, scene), found in zip(items, detect(pictures, world), strict=True):
            assert shown(found) == Counter((thing.shape, thing.colour) for thing in scene), prompt.prompt
            assert judge(prompt, found) == (True, True)


def test_noise_does_not_deceive() -> None:
    training = TrainingScenes(GRID, 100, seed=2)
    items = [training.scene(index) for index in range(100)]
    clean = torch.stack([draw(scene, 32) for _, scene in items])
    found = detect((clean + 0.2 * torch.randn(clean.shape)).clamp(0, 1), GRID)
    assert all(judge(prompt, things) == (True, True) for (prompt, _), things in zip(items, found, strict=True))


def test_the_place_that_is_found_is_where_it_was_drawn() -> None:
    scene = (Drawn("cross", "cyan", 20, 12, 7), Drawn("circle", "white", 4, 4, 7))
    for thing, found in zip(scene, sorted(detect(draw(scene, 32)[None], GRID)[0], key=lambda f: f.color or ""), strict=True):
        left, top, right, bottom = found.box
        assert ((left + right) / 2, (top + bottom) / 2) == (thing.x, thing.y) and (found.kind, found.color) == (
            thing.shape,
            thing.colour,
        )


def test_every_prompt_can_be_shown_and_no_other_scene_passes_for_it() -> None:
    """Of all prompts of all tags: its own scene is right; that of any prompt with other words of the tag is never strictly so."""
    dice = random.Random(0)
    for tag in TAGS:
        prompts = prompts_of(GRID, tag)[:: 1 if tag != "color_attr" else 12]
        scenes = [scene_of(GRID, prompt, dice) for prompt in prompts]
        found = detect(torch.stack([draw(scene, 32) for scene in scenes]), GRID)
        assert all(judge(prompt, things) == (True, True) for prompt, things in zip(prompts, found, strict=True))
        for (one, _), (other, things) in pairwise(zip(prompts, found, strict=True)):
            same = Counter((c.kind, c.color) for c in one.include) == Counter((c.kind, c.color) for c in other.include)
            if not same or tag == "position":
                assert judge(one, things) == (False, False), (one.prompt, other.prompt)


def test_strict_asks_for_nothing_else() -> None:
    cross, circle = Drawn("cross", "red", 4, 4, 7), Drawn("circle", "blue", 20, 20, 7)
    a_cross = prompts_of(GRID, "single_object")[GRID.shapes.index("cross")]
    alone, beside, blob = draw([cross], 32), draw([cross, circle], 32), draw([cross], 32)
    blob[1, 10:30, 20:22] = 1
    found = detect(torch.stack([alone, beside, blob]), GRID)
    assert [judge(a_cross, things) for things in found] == [(True, True), (True, False), (True, False)]
    assert shown(found[2])[UNKNOWN, "green"] == 1


def test_nothing_is_found_in_nothing_and_no_shape_in_a_full_picture() -> None:
    black, white, speck = torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.zeros(3, 32, 32)
    speck[0, :7, 0] = 1  # 7 px of one colour, less than an object
    found = detect(torch.stack([black, white, speck]), GRID)
    assert [[thing.kind for thing in things] for things in found] == [[], [UNKNOWN], []]


def test_nearby_objects_of_one_colour_stay_two() -> None:
    scene = [Drawn("square", "green", 4, 4, 7), Drawn("square", "green", 12, 4, 7), Drawn("circle", "green", 4, 12, 7)]
    assert shown(detect(draw(scene, 32)[None], GRID)[0]) == {("square", "green"): 2, ("circle", "green"): 1}


def test_stamps_cover_the_area_of_their_shape() -> None:
    areas = {"circle": 0.785398, "square": 0.88**2, "triangle": 0.5, "cross": 5 / 9, "ring": 0.589049, "diamond": 0.5}
    for shape, area in areas.items():
        assert float(stamp(shape, 20, 31.3, 30.6, 64).sum()) == pytest.approx(area * 400, rel=0.01)


def test_scenes_depend_on_seed_and_index_alone_and_tags_are_in_equal_shares() -> None:
    scenes = TrainingScenes(GRID, 600)
    assert scenes.scene(7) == TrainingScenes(GRID, 10).scene(7) != TrainingScenes(GRID, 10, seed=1).scene(7)
    tags = Counter(scenes.scene(index)[0].tag for index in range(600))
    assert set(tags) == set(TAGS) and min(tags.values()) > 70
    picture, caption = scenes[7]
    assert picture.shape == (3, 32, 32) and caption == scenes.scene(7)[0].prompt and 0 <= picture.min() < picture.max() == 1
    with pytest.raises(IndexError, match="600"):
        scenes[600]


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_held_out_is_neither_shown_nor_said(name: str) -> None:
    world = WORLDS[name]
    training = TrainingScenes(world, 300)
    scenes = [training.scene(index) for index in range(300)]
    hidden = set(zip(world.shapes, COLOURS, strict=False))
    assert not hidden & {(thing.shape, thing.colour) for _, scene in scenes for thing in scene}
    captions = " ; ".join(prompt.prompt for prompt, _ in scenes)
    assert "red circle" not in captions and "a circle and a square" not in captions and "a square and a circle" in captions
    asked = benchmark(world)
    assert any(held_out(world, prompt) for prompt in asked) and any(not held_out(world, prompt) for prompt in asked)


def test_held_out_pairs_follow_the_caption() -> None:
    texts = {prompt.prompt: held_out(GRID, prompt) for tag in TAGS for prompt in prompts_of(GRID, tag)}
    assert texts["a circle above a square"] and not texts["a square above a circle"]
    assert texts["a blue triangle"] and not texts["a blue circle"] and texts["a white cross and a red circle"]
    assert not texts["a cross"] and not texts["three crosses"]


def test_the_benchmark_is_fixed_and_whole_where_a_tag_is_small() -> None:
    asked = benchmark(GRID)
    assert asked == benchmark(GRID) != benchmark(GRID, seed=1)
    assert Counter(prompt.tag for prompt in asked) == dict(zip(TAGS, (4, 12, 12, 28, 48, 48), strict=True))
    assert len({prompt.prompt for prompt in asked}) == len(asked)
    assert Prompt.model_validate_json(asked[-1].line()) == asked[-1]


def test_bad_input_is_named() -> None:
    with pytest.raises(ShapesError, match="'cube'; choices: grid, free32, free64"):
        find_world("cube")
    with pytest.raises(ShapesError, match="'colour'; choices: single_object"):
        prompts_of(GRID, "colour")
    with pytest.raises(EvaluationError, match=r"\(B, 3, 32, 32\), got torch.uint8 \(1, 3, 32, 32\)"):
        detect(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), GRID)
