"""The commands that write prompts and score pictures: from files to a table, without weights; and each bad input one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

from lineate.cli.app import app
from lineate.evaluate.geneval import DETECTIONS, Detections
from lineate.evaluate.geneval_prompts import COLORS, geneval_prompts
from lineate.evaluate.rules import Found
from lineate.text2image.prompts import Clause, Prompt, read_prompts, sample_file, write_layout
from lineate.text2image.shapes import WORLDS, benchmark, draw, held_out, scene_of

from ..eyes import clip, mask2former, vilt

GRID = WORLDS["grid"]
HEADER = "item_id,proposition_id,dependency,category_broad,category_detailed,question_natural_language\n"


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def shown(*arguments: Any) -> str:
    """What a command that goes well says, its lines joined."""
    found = call(*arguments)
    assert found.exit_code == 0, found.stderr
    return " ".join(str(found.stdout).split())


def refused(*arguments: Any) -> str:
    """The last line, which tells the error; before it there may be what was being done, and never a traceback."""
    found = call(*arguments)
    assert found.exit_code == 1 and "Traceback" not in found.stderr, found.stderr
    last = str(found.stderr).splitlines()[-1]
    assert last.startswith("error: ")
    return last


def drawn(out: Path, right: int) -> Path:
    """Pictures of the benchmark's first prompts, two each, of which the first `right` prompts are shown, the others black."""
    dice, prompts = random.Random(0), benchmark(GRID)[:20]
    write_layout(prompts, out)
    for index, prompt in enumerate(prompts):
        for number in range(2):
            scene = scene_of(GRID, prompt, dice) if index < right else ()
            to_pil_image(draw(scene, 32)).save(sample_file(out, index, number))
    return out


def test_prompts_become_a_file(tmp_path: Path) -> None:
    for name, count in (("geneval", 553), ("grid", 152)):
        assert f"({count})" in shown("prompts", name, tmp_path / f"{name}.jsonl")
        assert len(read_prompts(tmp_path / f"{name}.jsonl")) == count
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x1.txt").write_text("a long text")
    assert call("prompts", tmp_path / "texts", tmp_path / "dpg.jsonl").exit_code == 0
    assert [(p.tag, p.prompt) for p in read_prompts(tmp_path / "dpg.jsonl")] == [("x1", "a long text")]
    assert "'geneva'; choices: geneval, grid, free32, free64" in refused("prompts", "geneva", tmp_path / "x.jsonl")
    assert "exists; pass --overwrite" in refused("prompts", "grid", tmp_path / "grid.jsonl")


def test_drawn_shapes_are_scored_and_compared(tmp_path: Path) -> None:
    all_right, half = drawn(tmp_path / "a", 20), drawn(tmp_path / "b", 10)
    said = shown("shapes", all_right, "--against", half, "--out", tmp_path / "figures.json")
    assert "strict: 40 pictures of 20 prompts" in said and "100.00" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["strict"]["scores"]["overall"]["value"] == 1
    assert figures["strict"]["against"]["tags"]["two_object"]["value"] == 0.5
    assert figures["correct"]["difference"]["overall"]["p"] < 0.01


def test_held_out_and_seen_prompts_make_up_all(tmp_path: Path) -> None:
    made = drawn(tmp_path / "a", 20)
    for part in ("all", "seen", "held-out"):
        shown("shapes", made, "--part", part, "--out", tmp_path / f"{part}.json")
    counts = {path.stem: json.loads(path.read_text())["strict"]["scores"]["prompts"] for path in tmp_path.glob("*.json")}
    hidden = sum(held_out(GRID, prompt) for prompt in benchmark(GRID)[:20])
    assert counts == {"all": 20, "seen": 20 - hidden, "held-out": hidden} and 0 < hidden < 20
    assert "unknown part 'new'; choices: all, seen, held-out" in refused("shapes", made, "--part", "new")


def test_bad_folders_of_shapes_are_one_line(tmp_path: Path) -> None:
    made = drawn(tmp_path / "a", 1)
    assert "unknown world 'cube'; choices: grid" in refused("shapes", made, "--world", "cube")
    assert "is not 64x64 px" in refused("shapes", made, "--world", "free64")
    (made / "00000" / "metadata.jsonl").write_text('{"tag": "x", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}')
    assert "'a cat' is no prompt of this world, whose shapes are circle" in refused("shapes", made)
    assert "holds no folders 00000" in refused("shapes", tmp_path / "nowhere")
    (made / "00019" / "metadata.jsonl").write_text(benchmark(GRID)[30].line())
    assert "not of the same prompts" in refused("shapes", made, "--against", drawn(tmp_path / "b", 1))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """One picture each of GenEval's first two prompts, a bench and ..., with what was found in them: the bench alone."""
    out, prompts = tmp_path / "made", geneval_prompts()[:2]
    write_layout(prompts, out)
    lines = []
    for index in range(2):
        Image.new("RGB", (8, 8)).save(sample_file(out, index, 0))
        bench = Found(kind=prompts[0].include[0].kind, box=(0, 0, 4, 4), score=0.5)
        name = sample_file(out, index, 0).relative_to(out).as_posix()
        lines.append(Detections(picture=name, detector="by hand", objects=(bench,)).model_dump_json())
    (out / DETECTIONS).write_text("\n".join(lines))
    return out


def test_geneval_is_scored_from_detections_without_weights(photographs: Path, tmp_path: Path) -> None:
    said = shown("geneval", photographs, "--results", tmp_path / "results.jsonl", "--against", photographs)
    assert "GenEval, detector=by hand: 2 pictures of 2 prompts" in said and "50.00" in said
    assert [json.loads(line)["correct"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [True, False]
    lines = (photographs / DETECTIONS).read_text()
    (tmp_path / "others.jsonl").write_text(lines.replace("by hand", "by eye"))
    options = ("--detections", tmp_path / "others.jsonl", "--against", photographs)
    assert "what by eye and by hand found cannot be compared" in refused("geneval", photographs, *options)
    (photographs / DETECTIONS).unlink()
    assert f"cannot get {tmp_path}: " in refused("geneval", photographs, "--detector", tmp_path)


def test_dpg_is_scored_from_answers_without_weights(tmp_path: Path) -> None:
    questions, answers, grids = tmp_path / "questions.csv", tmp_path / "answers.csv", tmp_path / "grids"
    questions.write_text(
        HEADER + "a,1,0,entity,whole,Is there a cat?\na,2,1,attribute,color,Is it red?\nb,1,0,entity,whole,A dog?\n"
    )
    grids.mkdir()
    for item in "ab":
        Image.new("RGB", (4, 4)).save(grids / f"{item}.png")
    rows = [
        f"{item},{image},{number},yes" for item, numbers in (("a", "12"), ("b", "1")) for image in range(4) for number in numbers
    ]
    answers.write_text("item,image,question,answer\n" + "\n".join(rows) + "\n")
    said = shown("dpg", grids, "--questions", questions, "--answers", answers, "--grids", tmp_path / "joined")
    assert "DPG-Bench, fixed, answers of unnamed: 8 pictures of 2 prompts" in said and "entity: 100.00" in said
    assert sorted(path.name for path in (tmp_path / "joined").iterdir()) == ["a.png", "b.png"]
    official = call(
        "dpg", grids, "--questions", questions, "--answers", answers, "--official", "--out", tmp_path / "figures.json"
    )
    assert official.exit_code == 0 and json.loads((tmp_path / "figures.json").read_text())["mode"] == "official"
    answers.write_text("\n".join(answers.read_text().splitlines()[:-1]) + "\n")
    missing = refused("dpg", grids, "--questions", questions, "--answers", answers, "--vqa", tmp_path)
    assert f"cannot get {tmp_path}: " in missing


def test_models_in_directories_look_at_the_pictures_once(tmp_path: Path) -> None:
    """The whole way with transformers' own loading; random weights, made sure of a person here and of yes there."""
    network, (colors, tokenizer, processor) = mask2former(), clip()
    network.class_predictor.bias.data[0] = 100
    network.save_pretrained(tmp_path / "eyes")
    for part in (colors, tokenizer, processor):
        part.save_pretrained(tmp_path / "clip")
    person = Clause(kind="person", count=1)
    prompts = [
        Prompt(tag="single_object", include=(person,), prompt="a person"),
        Prompt(tag="colors", include=(person.model_copy(update={"color": "red"}),), prompt="a red person"),
    ]
    write_layout(prompts, tmp_path / "made")
    for index in range(2):
        Image.effect_noise((40, 40), 90).convert("RGB").save(sample_file(tmp_path / "made", index, 0))
    options = ("--detector", tmp_path / "eyes", "--clip", tmp_path / "clip")
    assert f"detector=hf:{tmp_path / 'eyes'}" in "".join(shown("geneval", tmp_path / "made", *options).split(" "))
    found = [Detections.model_validate_json(line) for line in (tmp_path / "made" / DETECTIONS).read_text().splitlines()]
    assert [one.objects[0].kind for one in found] == ["person"] * 2
    assert found[0].objects[0].color is None and found[1].objects[0].color in COLORS
    shutil.rmtree(tmp_path / "eyes")
    shown("geneval", tmp_path / "made", *options)

    model, processor = vilt()
    model.classifier[-1].bias.data[1] = 100
    model.save_pretrained(tmp_path / "vilt")
    processor.save_pretrained(tmp_path / "vilt")
    (tmp_path / "questions.csv").write_text(f"{HEADER}a,1,0,entity,whole,Is there a dog?\nb,1,0,entity,whole,A dog?\n")
    (tmp_path / "grids").mkdir()
    for item in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "grids" / f"{item}.png")
    said = shown("dpg", tmp_path / "grids", "--questions", tmp_path / "questions.csv", "--vqa", tmp_path / "vilt")
    assert "entity: 100.00" in said
