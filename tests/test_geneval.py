"""GenEval's prompts are the published ones, its rules decide every case by hand-built detections, and its models' code runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lineate.evaluate import EvaluationError, geneval
from lineate.evaluate.geneval import Sighting, kept, look
from lineate.evaluate.geneval_prompts import CLASSES, COLORS, geneval_prompts
from lineate.evaluate.rules import Box, Found, faults, relations
from lineate.text2image.prompts import (
    Clause,
    Prompt,
    PromptError,
    prompt_folder,
    read_layout,
    read_prompts,
    sample_file,
    write_layout,
    write_prompts,
)

from .eyes import clip, mask2former


def clause(kind: str, count: int = 1, **more: Any) -> Clause:
    return Clause(kind=kind, count=count, **more)


def asks(*include: Clause, exclude: tuple[Clause, ...] = (), tag: str = "any") -> Prompt:
    return Prompt(tag=tag, include=include, exclude=exclude, prompt="a photo")


def at(kind: str, x: float, y: float, score: float = 0.95, color: str | None = None, side: float = 10) -> Found:
    return Found(kind=kind, box=box(x, y, side), score=score, color=color)


def box(x: float, y: float, side: float = 10) -> Box:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def test_the_prompts_are_the_published_file_byte_for_byte(tmp_path: Path) -> None:
    prompts = geneval_prompts()
    write_prompts(prompts, tmp_path / "prompts.jsonl")
    stored = (tmp_path / "prompts.jsonl").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert read_prompts(tmp_path / "prompts.jsonl") == prompts


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (box(0, 0), box(30, 0), {"left of"}),
        (box(30, 0), box(0, 0), {"right of"}),
        (box(0, 0), box(0, 30), {"above"}),
        (box(0, 30), box(0, 0), {"below"}),
        (box(0, 0), box(30, 30), {"left of", "above"}),
        (box(0, 0), box(0, 0), set()),
        (box(0, 0), box(2, 2), set()),  # within a tenth of both sides together: 0.1·(10 + 10)
        (box(0, 0), box(4, 0), set()),  # revised to 2 of 4: exactly half is not more than half
        (box(0, 0), box(4.1, 0), {"left of"}),
        (box(0, 0), box(30, 16), {"left of"}),  # 14 of 34 down is less than half
    ],
)  # fmt: skip
def test_relations(a: Box, b: Box, expected: set[str]) -> None:
    assert relations(a, b) == expected


def test_count_is_at_least_and_exclude_is_the_ceiling() -> None:
    three = [at("cat", 20 * k, 0) for k in range(3)]
    two_cats = asks(clause("cat", 2), exclude=(clause("cat", 3),))
    assert faults(two_cats, three[:2]) == []
    assert faults(two_cats, three[:1]) == ["expected cat>=2, found 1"]
    assert faults(two_cats, three) == ["expected cat<3, found 3"]
    assert faults(asks(clause("cat", 2)), three) == []
    assert faults(asks(clause("cat"), clause("dog")), three) == ["expected dog>=1, found 0"]


def test_only_the_surest_are_asked_for_their_colour() -> None:
    red_cat = asks(clause("cat", color="red"))
    red, blue = at("cat", 0, 0, 0.8, "red"), at("cat", 30, 0, 0.9, "blue")
    assert faults(red_cat, [red]) == []
    assert faults(red_cat, [red, blue]) == ["expected red cat>=1, found blue"]
    assert faults(red_cat, [red, blue.model_copy(update={"score": 0.8})]) == []  # of equals the first
    both = asks(clause("cat", 2, color="red"))
    assert faults(both, [red, blue]) == ["expected red cat>=2, found blue, red"]
    assert faults(both, [red, red]) == []
    assert faults(red_cat, [at("cat", 0, 0)], lambda thing: "red") == []


def test_position_is_asked_of_the_surest_and_needs_its_target() -> None:
    left = asks(clause("dog"), clause("cat", position=("left of", 0)))
    cat, dog = at("cat", 0, 0), at("dog", 50, 0)
    assert faults(left, [cat, dog]) == []
    assert faults(left, [at("cat", 90, 0), dog]) == ["expected cat left of dog, found right of"]
    assert faults(left, [at("cat", 50, 0), dog]) == ["expected cat left of dog, found neither"]
    assert faults(left, [cat, at("cat", 90, 0, 0.99), dog]) == ["expected cat left of dog, found right of"]
    assert faults(left, [cat]) == ["expected dog>=1, found 0", "no target for cat to be left of"]
    assert faults(left, [dog]) == ["expected cat>=1, found 0"]
    every = asks(clause("dog", 2), clause("cat", position=("left of", 0)))
    assert faults(every, [cat, dog, at("dog", 80, 0)]) == []
    assert faults(every, [cat, dog, at("dog", -50, 0)]) == ["expected cat left of dog, found right of"]


def test_thresholds_differ_where_objects_are_counted() -> None:
    found = [at("cat", 0, 0, score) for score in (0.3, 0.31, 0.9, 0.91)]
    assert [thing.score for thing in kept(asks(clause("cat")), found)] == [0.91, 0.9, 0.31]
    assert [thing.score for thing in kept(asks(clause("cat"), tag="counting"), found)] == [0.91]
    many = [at("cat", k, 0, 0.5 + k / 100) for k in range(20)] + [at("dog", 0, 0, 0.4)]
    chosen = kept(asks(clause("cat")), many)
    assert [thing.kind for thing in chosen] == ["cat"] * 16 + ["dog"] and chosen[0].score == 0.69


def test_only_colours_that_are_asked_for_are_looked_at() -> None:
    """Of two cats and a dog, one red cat asked for: the surer cat alone."""
    things = [at("cat", 0, 0, 0.5), at("cat", 20, 0, 0.7), at("dog", 40, 0, 0.9)]
    asked = []

    def color_of(picture: Image.Image, sighting: Sighting) -> str:
        asked.append(sighting.found)
        return "red"

    found = look(asks(clause("cat", color="red")), Image.new("RGB", (60, 20)), lambda _: [Sighting(t) for t in things], color_of)
    assert asked == [things[1]]
    assert [(thing.kind, thing.color) for thing in found] == [("dog", None), ("cat", "red"), ("cat", None)]


class Squares:
    """Finds one 'cat' as large as the picture's white part, and says that it is white."""

    name = "squares"
    calls = 0

    def __call__(self, picture: Image.Image) -> list[Sighting]:
        self.calls += 1
        white = picture.convert("L").getbbox()
        return [Sighting(Found(kind="cat", box=tuple(map(float, white)), score=0.95))] if white else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two prompts with two pictures: a cat in the first of each."""
    prompts = [asks(clause("cat", color="white"), tag="colors"), asks(clause("cat", 2), tag="counting")]
    out = tmp_path / "made"
    write_layout(prompts, out)
    for index in range(2):
        for number in range(2):
            picture = Image.new("RGB", (16, 16))
            if number == 0:
                picture.paste((255, 255, 255), (2, 2, 10, 10))
            picture.save(sample_file(out, index, number))
    return out


def test_a_folder_is_looked_at_once_and_scored_from_the_file(folder: Path, tmp_path: Path) -> None:
    file, squares = tmp_path / "seen.jsonl", Squares()
    geneval.detect(folder, file, squares, lambda picture, sighting: "white")
    geneval.detect(folder, file, squares, lambda picture, sighting: "white")
    assert squares.calls == 4
    verdicts = geneval.score(folder, geneval.read_detections(file))
    scores = geneval.judged(verdicts)
    assert [(of.tag, of.scores) for of in scores] == [("colors", (1.0, 0.0)), ("counting", (0.0, 0.0))]
    geneval.write_results(folder, verdicts, tmp_path / "results.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False, False, False]
    assert lines[3]["reason"] == "expected cat>=2, found 0" and json.loads(lines[3]["metadata"])["tag"] == "counting"


def test_detections_of_several_detectors_do_not_mix_and_none_may_be_missing(folder: Path, tmp_path: Path) -> None:
    file, squares = tmp_path / "seen.jsonl", Squares()
    geneval.detect(folder, file, squares, lambda picture, sighting: "white")
    squares.name = "others"
    with pytest.raises(EvaluationError, match="different detectors found, others and squares"):
        geneval.detect(folder, file, squares, lambda picture, sighting: "white")
    known = geneval.read_detections(file)
    del known["00001/samples/0001.png"]
    with pytest.raises(EvaluationError, match=r"no detections of .*00001/samples/0001.png"):
        geneval.score(folder, known)
    file.write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"seen.jsonl:1 is no line of detections"):
        geneval.read_detections(file)


def test_the_layout_is_read_as_written_and_an_unfinished_one_refused(folder: Path) -> None:
    assert [(prompt.tag, len(files)) for prompt, files in read_layout(folder)] == [("colors", 2), ("counting", 2)]
    sample_file(folder, 1, 1).unlink()
    with pytest.raises(PromptError, match=r"00001 has 1 pictures and .*00000 2"):
        read_layout(folder)
    sample_file(folder, 1, 0).unlink()
    with pytest.raises(PromptError, match="holds no picture"):
        read_layout(folder)
    (prompt_folder(folder, 1) / "metadata.jsonl").write_text('{"tag": "x", "include": [], "prompt": 1}')
    with pytest.raises(PromptError, match=r"metadata.jsonl:1 is no prompt: prompt: Input should be a valid string"):
        read_layout(folder)
    with pytest.raises(PromptError, match="holds no folders"):
        read_layout(folder / "00000")


def test_a_position_names_an_earlier_clause() -> None:
    with pytest.raises(ValueError, match="must name an earlier one, got 1"):
        asks(clause("dog"), clause("cat", position=("above", 1)))


# transformers' own code, random weights


@pytest.fixture(scope="module")
def detector() -> Any:
    from lineate.evaluate.detectors import Mask2FormerDetector

    return Mask2FormerDetector(mask2former(), "tiny", short=40, long=64)


def test_mask2former_gives_the_likeliest_with_boxes_of_their_masks(detector: Any) -> None:
    found = detector(Image.effect_noise((50, 30), 90).convert("RGB"))
    assert 0 < len(found) <= 100 and {sighting.found.kind for sighting in found} <= set(CLASSES)
    for sighting in found:
        left, top, right, bottom = map(int, sighting.found.box)
        assert sighting.mask.shape == (30, 50) and 0 < sighting.found.score < 1
        inside = torch.zeros(30, 50, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert not (sighting.mask & ~inside).any()
        assert sighting.mask[top].any() and sighting.mask[bottom - 1].any()
        assert sighting.mask[:, left].any() and sighting.mask[:, right - 1].any()


def test_masks_and_scores_follow_the_logits(detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the network's answer given: query 2 sees a zebra in the left half of a picture that is scaled and padded."""
    from types import SimpleNamespace

    seen = {}

    def answer(pixel_values: torch.Tensor) -> Any:
        seen["shape"] = tuple(pixel_values.shape)
        classes, masks = torch.zeros(1, 6, 81), torch.full((1, 6, 16, 16), -8.0)
        classes[..., -1] = 30  # nothing, all but one
        classes[0, 2, -1], classes[0, 2, CLASSES.index("zebra")] = 0, 30
        masks[0, 2, :, :8] = 2.0
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)

    monkeypatch.setattr(detector.model, "forward", answer)
    first = detector(Image.new("RGB", (64, 40)))[0]
    assert seen["shape"] == (1, 3, 64, 64)  # 40 by 64 px, padded below
    assert (first.found.kind, first.found.box) == ("zebra", (0, 0, first.found.box[2], 40)) and 30 < first.found.box[2] < 35
    assert first.found.score == pytest.approx(0.85, abs=0.05)  # the mean sigmoid of 2 and of the slope at the edge


def test_an_object_is_cut_out_on_grey() -> None:
    from lineate.evaluate.detectors import cut_out

    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 2] = True
    part = cut_out(Image.new("RGB", (8, 8), (255, 0, 0)), Sighting(Found(kind="cat", box=(2, 2, 4, 4), score=1), mask))
    assert part.size == (2, 2) and part.getpixel((0, 0)) == (255, 0, 0) and part.getpixel((1, 1)) == (153, 153, 153)


def test_clip_names_the_colour_whose_sentences_are_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    from lineate.evaluate.detectors import ClipColors

    colors = ClipColors(*clip())
    picture, cat = Image.effect_noise((20, 20), 90).convert("RGB"), Sighting(Found(kind="cat", box=(2, 2, 18, 18), score=1))
    assert colors(picture, cat) in COLORS
    vectors = colors._colors("cat")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(10))
    monkeypatch.setattr(colors, "_picture", lambda _: vectors[7])
    assert colors(picture, cat) == COLORS[7]


def test_a_detector_of_other_classes_is_refused(detector: Any) -> None:
    from types import SimpleNamespace

    from lineate.evaluate.detectors import Mask2FormerDetector, load

    other = torch.nn.Identity()
    other.config = SimpleNamespace(num_labels=133)
    with pytest.raises(EvaluationError, match="panoptic tells 133 classes apart"):
        Mask2FormerDetector(other, "panoptic")
    with pytest.raises(EvaluationError, match="cannot get nowhere"):
        load(SimpleNamespace(from_pretrained=lambda name: Path(name).read_text()), "nowhere")
