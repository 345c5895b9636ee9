"""DPG-Bench's scores follow the graph of questions; answers come from a file that anybody fills, or from transformers' ViLT."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lineate.evaluate import EvaluationError, dpg
from lineate.evaluate.tally import tally
from lineate.text2image.prompts import sample_file, write_layout

from .eyes import vilt

QUESTIONS = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
a,A,,1,0,entity,entity - whole,x,Is there a cat?
a,A,,2,1,attribute,attribute - color,x,Is the cat red?
a,A,,3,2,relation,relation - spatial,x,"Is the red cat left, of anything?"
a,A,,4,"1,2",entity,entity - part,x,Has it a tail?
b,B,,1,0,entity,entity - whole,x,Is there a dog?
b,B,,2,0,global,global - ,x,Is it a photo?
"""
PARTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    file = tmp_path / "questions.csv"
    file.write_text(QUESTIONS)
    return file


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    """A 2×2 grid of four colours for each item."""
    out = tmp_path / "grids"
    out.mkdir()
    for item in "ab":
        dpg.join([Image.new("RGB", (4, 2), colour) for colour in PARTS]).save(out / f"{item}.png")
    return out


def all_yes(but: dict[tuple[str, int, int], str] | None = None) -> dpg.Answers:
    numbers = {"a": 4, "b": 2}
    given = {(item, i, q): "yes" for item in "ab" for i in range(4) for q in range(1, numbers[item] + 1)}
    return dpg.Answers("me", given | (but or {}))


def test_children_of_no_are_no_in_the_order_of_rows(graph: Path) -> None:
    questions = dpg.read_questions(graph)
    assert questions[3].parents == (1, 2) and questions[2].text == "Is the red cat left, of anything?"
    found = dpg.score(questions, all_yes({("a", 0, 2): "no", ("a", 1, 1): "a dog", ("b", 3, 1): "no"}))
    # picture 0: the cat is not red, so 3 (a child of 2) and 4 are moot; picture 1: there is no cat, so nothing counts
    assert [of.scores for of in found.prompts] == [(0.25, 0.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.5)]
    assert tally(found.prompts).overall.value == pytest.approx((2.25 / 4 + 3.5 / 4) / 2)
    assert found.broad == {"attribute": 2 / 4, "entity": (3 + 2 + 3) / 12, "global": 1.0, "relation": 2 / 4}
    assert found.detailed["entity - part"] == 2 / 4


def test_official_skips_the_first_row_and_takes_categories_from_the_last_picture(graph: Path) -> None:
    questions = dpg.read_questions(graph)
    found = dpg.score(questions, all_yes({("a", 0, 1): "no", ("a", 3, 2): "no", ("b", 0, 1): "no"}), "official")
    # picture 0: question 1 is not asked, so its no moves nothing; picture 3: 2 is no, and 3 and 4 with it
    assert [of.scores for of in found.prompts] == [(1.0, 1.0, 1.0, 0.0), (0.5, 1.0, 1.0, 1.0)]
    assert found.broad == {"attribute": 0.0, "entity": 1.0, "global": 1.0, "relation": 1.0}


def test_an_item_whose_only_question_is_the_first_row_is_not_scored_officially(tmp_path: Path) -> None:
    file = tmp_path / "short.csv"
    header, first, *_, last, again = QUESTIONS.splitlines()
    file.write_text("\n".join((header, first, last, again)))
    answers = all_yes()
    questions = dpg.read_questions(file)
    assert [of.prompt for of in dpg.score(questions, answers, "official").prompts] == ["b"]
    assert [of.prompt for of in dpg.score(questions, answers).prompts] == ["a", "b"]


class ThirdAlone:
    """Says yes to the third picture of the grid, and notes what it was asked."""

    name = "third"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any, str]] = []

    def __call__(self, picture: Image.Image, question: str) -> str:
        self.asked.append((picture.size, picture.getpixel((0, 0)), question))
        return "Yes" if picture.getpixel((3, 1)) == PARTS[2] else "no"


def test_each_quarter_is_asked_and_nothing_twice(graph: Path, grids: Path, tmp_path: Path) -> None:
    file, viewer, questions = tmp_path / "answers.csv", ThirdAlone(), dpg.read_questions(graph)
    dpg.ask(grids, questions, viewer, file)
    assert len(viewer.asked) == 24 and {size for size, *_ in viewer.asked} == {(4, 2)}
    assert [colour for _, colour, question in viewer.asked if question == "Is there a dog?"] == list(PARTS)
    dpg.ask(grids, questions, viewer, file)
    assert len(viewer.asked) == 24
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    dpg.ask(grids, questions, viewer, file)
    assert [question for *_, question in viewer.asked[24:]] == ["Is it a photo?"]
    answers = dpg.read_answers(file)
    assert answers.viewer == "third"
    assert [of.scores for of in dpg.score(questions, answers).prompts] == [(0, 0, 1, 0)] * 2
    viewer.name = "fourth"
    with pytest.raises(EvaluationError, match="the answers of third, not of fourth"):
        dpg.ask(grids, questions, viewer, file)


def test_folders_of_generated_pictures_are_the_same_as_grids(graph: Path, grids: Path, tmp_path: Path) -> None:
    """From ITEM.txt to a prompt file's layout, whose pictures are asked about, and become the grids."""
    for item in "ba":
        (tmp_path / f"{item}.txt").write_text(f"{item} picture\n")
    prompts = dpg.read_texts(tmp_path)
    assert [(prompt.tag, prompt.prompt) for prompt in prompts] == [("a", "a picture"), ("b", "b picture")]
    write_layout(prompts, tmp_path / "made")
    for index, number in product(range(2), range(4)):
        Image.new("RGB", (4, 2), PARTS[number]).save(sample_file(tmp_path / "made", index, number))
    answers = []
    for name, folder in (("made", tmp_path / "made"), ("grids", grids)):
        dpg.ask(folder, dpg.read_questions(graph), ThirdAlone(), tmp_path / f"{name}.csv")
        answers.append(dpg.read_answers(tmp_path / f"{name}.csv"))
    assert answers[0] == answers[1]
    dpg.write_grids(tmp_path / "made", tmp_path / "joined")
    for item in "ab":
        assert Image.open(tmp_path / "joined" / f"{item}.png").tobytes() == Image.open(grids / f"{item}.png").tobytes()
    sample_file(tmp_path / "made", 0, 3).unlink()
    sample_file(tmp_path / "made", 1, 3).unlink()
    with pytest.raises(EvaluationError, match="one folder of 4 pictures; a has 3"):
        dpg.read_pictures(tmp_path / "made")


def test_bad_input_is_named(graph: Path, grids: Path, tmp_path: Path) -> None:
    questions, bad = dpg.read_questions(graph), tmp_path / "bad.csv"
    missing = dpg.Answers("me", {key: answer for key, answer in all_yes().given.items() if key != ("b", 2, 1)})
    with pytest.raises(EvaluationError, match="question 1 about picture 2 of b has no answer"):
        dpg.score(questions, missing)
    with pytest.raises(EvaluationError, match="no answer to any"):
        dpg.score(questions, dpg.Answers("me", {}))
    for text, reason in {
        "item_id\n": "no column 'proposition_id'",
        QUESTIONS.replace('"1,2"', "7"): "question 4 of a depends on 7, which is not there",
        QUESTIONS.replace("a,A,,2,1", "a,A,,1,1"): "a has two questions 1",
        QUESTIONS.replace("a,A,,2,1", "a,A,,2,one"): "bad.csv:3 is no question",
    }.items():
        bad.write_text(text)
        with pytest.raises(EvaluationError, match=reason):
            dpg.read_questions(bad)
    bad.write_text("item,image,question,answer\na,first,1,yes\n")
    with pytest.raises(EvaluationError, match=r"bad.csv:2: image and question are whole numbers"):
        dpg.read_answers(bad)
    bad.write_text("item,image,question,answer,viewer\na,0,1,yes,me\na,0,2,yes,you\n")
    with pytest.raises(EvaluationError, match="one viewer, got me and you"):
        dpg.read_answers(bad)
    (grids / "a.png").rename(grids / "c.png")
    with pytest.raises(EvaluationError, match="no questions to 'c'"):
        dpg.ask(grids, questions, ThirdAlone(), tmp_path / "answers.csv")
    with pytest.raises(EvaluationError, match="even sides, got 3x2 px"):
        dpg.quarter(Image.new("RGB", (3, 2)), 0)
    with pytest.raises(EvaluationError, match="4 pictures of one size"):
        dpg.join([Image.new("RGB", (2, 2))] * 3)
    with pytest.raises(EvaluationError, match="no prompts"):
        dpg.read_texts(grids)


def test_vilt_answers_with_its_likeliest_label() -> None:
    from lineate.evaluate.vqa import VqaViewer

    model, processor = vilt()
    viewer = VqaViewer(model, processor, "tiny")
    model.classifier[-1].bias.data[1] = 100.0
    assert viewer(Image.new("RGB", (40, 32)), "is there a dog ? is there a dog ?") == "yes"
    model.classifier[-1].bias.data[2] = 200.0
    assert viewer(Image.new("RGB", (40, 32)), "is there a dog ?") == "red"
