"""The experiments: a run converts, calibrates, tunes and evaluates as it says, and a table shows what its result files hold."""

from __future__ import annotations

import base64
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

import lineate
from lineate.cli.app import app
from lineate.cli.options import settings
from lineate.data import open_data
from lineate.evaluate.fid import Extractor, Features
from lineate.models.dit import DiT
from lineate.settings import read_settings
from lineate.text2image.shapes import held_out
from lineate.train.latents import cache

ROOT = Path(__file__).parents[1] / "experiments"
TABLES = ("table1", "table2", "table3", "table4", "table5", "table11", "tune", "starts")
GENERATION = ("table6", "table10", "table12")
COMMANDS = get_command(app)
DOCUMENTS = (ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").glob("*.md")))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    found = {name: importlib.import_module(name) for name in ("small", "harness", "generation", "table7", *TABLES, *GENERATION)}
    monkeypatch.setattr(found["harness"], "RESULTS", tmp_path / "results")
    return found


@pytest.fixture
def data(tmp_path: Path) -> Any:
    draw = torch.Generator().manual_seed(0)
    for split, name, index in [(s, f"class{c}", i) for s in ("train", "test") for c in range(10) for i in range(2)]:
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return [open_data(tmp_path / "data", split=split) for split in ("train", "test")]


@pytest.mark.slow
def test_a_run_leaves_its_figures_and_a_table_shows_them(
    modules: dict[str, ModuleType], data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, harness = modules["small"], modules["harness"]
    torch.manual_seed(0)
    lineate.save(lineate.convert(small.build(), "softmax"), tmp_path / "host")
    monkeypatch.setattr(small, "HOST", tmp_path / "host")
    quick = {"epochs": 1.0, "warmup_epochs": 0.5, "batch": 10, "compile": False}
    monkeypatch.setattr(small, "TUNING", small.TUNING.model_copy(update=quick))
    monkeypatch.setattr(small, "CALIBRATION", small.CALIBRATION.model_copy(update={"steps": 2, "batch": 2, "pool": 4}))

    run = harness.Run("t5-paper", ("train.new_lr_multiplier=3",), "freeze", calibrated=True)
    row = harness.execute(run, 1, *data)
    assert row["train"]["protocol"] == "freeze" and row["train"]["seed"] == row["conversion"]["seed"] == 1
    assert row["train"]["new_lr_multiplier"] == 3 and row["results"]["tuning"]["steps"] == 2
    assert row["results"]["calibration"]["images"] == 4
    assert row["results"]["final"]["images"] == row["results"]["calibrated_only"]["images"] == 20

    table = harness.Table("t", "t", ("FT",), (harness.Row("a row", (1.5,), (run,)),))
    assert "| a row | 1.5 | not run |" in harness.markdown(table)
    file = harness.result_file(run, 1)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row))
    shown = f"{100 * row['results']['final']['top1']['value']:.1f}"
    assert f"| a row | 1.5 | {shown} ±" in harness.markdown(table)

    bare = harness.execute(harness.Run("linear", tune=None), 0, *data)
    assert bare["train"] is None and set(bare["results"]) == {"new_parameters", "final"}


@pytest.mark.slow
def test_a_denoiser_is_converted_fitted_tuned_and_measured_by_its_pictures(
    modules: dict[str, ModuleType], data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    generation, harness = modules["generation"], modules["harness"]
    torch.manual_seed(0)
    lineate.save(lineate.convert(DiT(8, 2, 3, 16, 2, 2, num_classes=10, learn_sigma=False), "softmax"), tmp_path / "host")
    cache(data[0], tmp_path / "cache", size=8)
    extractor = Extractor("mean", lambda x: x.float().mean((-1, -2)))
    quick = {"HOST": tmp_path / "host", "SAMPLES": 40, "COMPONENTS": 3, "RESULTS": tmp_path / "results"}
    quick["TUNING"] = generation.TUNING.model_copy(update={"batch": 10})
    quick["CALIBRATION"] = generation.CALIBRATION.model_copy(update={"steps": 2, "batch": 2, "pool": 4})
    for name, value in (quick | {"find_extractor": lambda name, device: extractor}).items():
        monkeypatch.setattr(generation, name, value)

    run = harness.Run("dit5", ("train.epochs=1", "inherit=attention"), calibrated=True)
    row = generation.execute(run, 1, tmp_path / "cache", Features("mean", torch.rand(20, 3)))
    assert row["conversion"]["inherit"] == "attention" and row["results"]["tuning"]["steps"] == 2
    assert row["results"]["calibration"]["images"] == 4
    assert row["results"]["final"]["kid"]["samples"] == 40 and row["results"]["final"]["fd"]["components"] == 3
    with Image.open(tmp_path / "results" / "dit" / run.name / "seed1.png") as grid:
        assert grid.size == (10 * 9 + 1, 4 * 9 + 1)
    fd = row["results"]["final"]["fd"]["value"]
    assert generation.shown([row]).endswith(f" / {fd:.1f} (1)") and generation.shown([]) == "not run"


def test_runs_are_compared_image_by_image_seed_by_seed(modules: dict[str, ModuleType]) -> None:
    """Of four images, by two seeds: the one run is right where the other is wrong in 3 and in 1; a third seed has no partner."""

    def row(seed: int, *right: int) -> dict[str, Any]:
        packed = base64.b64encode(np.packbits(right).tobytes()).decode()
        return {"seed": seed, "results": {"final": {"images": 4, "correct": packed}}}

    ours = [row(0, 1, 1, 1, 0), row(1, 1, 0, 0, 0), row(2, 1, 1, 1, 1)]
    theirs = [row(1, 0, 0, 0, 0), row(0, 0, 0, 0, 0)]
    assert modules["harness"].above(ours, theirs).startswith("+50.0 [")
    assert modules["harness"].above(theirs, ours[:1]).startswith("-75.0 [") and modules["harness"].above(ours[2:], theirs) == ""


def test_full_size_commands_keep_the_papers_lengths(modules: dict[str, ModuleType]) -> None:
    lines = list(modules["harness"].full_size(modules["tune"].TABLE, "runs/deit/model", "IMAGENET"))
    epochs = [
        part.split("=")[1].split()[0] for line in lines for part in line.split("--set ")[1:] if part.startswith("train.epochs")
    ]
    assert epochs == ["3"] * 6 + ["6"] * 6 + ["15"] * 6
    assert "--recipe deit" in lines[1] and "--out runs/deit" in lines[1]


def test_full_size_generation_has_the_papers_budgets(modules: dict[str, ModuleType]) -> None:
    """Table 6 in epochs, of which DiT⁵ has 8; Tables 10 and 12 in 50,000 steps of 256 pictures, 32 on each of 8 GPUs."""

    def tuned(name: str) -> list[list[str]]:
        lines = modules["harness"].full_size(modules[name].TABLE, "HOST", "IMAGENET")
        parts = [shlex.split(part) for line in lines for part in line.split(" && ") if " train " in part]
        assert all(words[:7] == ["accelerate", "launch", "--num_processes", "8", "-m", "lineate", "train"] for words in parts)
        return [words[7:] for words in parts]

    assert "7.98" in [words[words.index("--epochs") + 1] for words in tuned("table6")]
    for words in (*tuned("table10"), *tuned("table12")):
        settings = read_settings(
            preset_name=words[words.index("--preset") + 1], recipe="dit5", trains=True,
            assignments=[value for flag, value in pairwise(words) if flag == "--set"],
        )  # fmt: skip
        assert settings.train is not None and (settings.train.steps, 8 * settings.train.batch) == (50_000, 256)


def parsed(line: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The commands of a line and what each is told; raises for an option, a preset, a recipe or a field that there is not."""
    for part in line.split(" && "):
        words = shlex.split(re.sub(r"^accelerate launch .*?-m lineate ", "lineate ", part), comments=True)
        assert words[0] == "lineate", part
        command = COMMANDS.get_command(None, words[1])
        assert command is not None, part
        said = command.make_context(words[1], words[2:]).params
        if "set_" in said:
            training = {"trains": True, "recipe": said["recipe"], "epochs": said["epochs"]} if words[1] == "train" else {}
            settings(said.get("source") or "embedded", said["preset"], said["config"], said["set_"], said.get("seed"), **training)
        yield words[1], said


def test_every_command_that_a_table_prints_is_one(modules: dict[str, ModuleType]) -> None:
    for name in (*TABLES, *GENERATION):
        table = modules[name].TABLE
        lines = [line for line in modules["harness"].full_size(table, table.on.host, "DATA") if not line.startswith("#")]
        assert lines and all(list(parsed(line)) for line in lines)


@pytest.mark.slow
def test_a_row_of_table_7_is_converted_once_and_tuned_for_every_budget(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table7 = modules["table7"]
    monkeypatch.setattr(table7.drawn, "SCENES", 256)
    monkeypatch.setattr(table7, "RESULTS", tmp_path)
    chosen = [next(prompt for prompt in table7.PROMPTS if held_out(table7.drawn.WORLD, prompt) is held) for held in (False, True)]
    monkeypatch.setattr(table7, "PROMPTS", chosen)
    monkeypatch.setattr(table7, "SAMPLING", table7.SAMPLING.model_copy(update={"steps": 1}))
    monkeypatch.setattr(table7, "CALIBRATION", table7.CALIBRATION.model_copy(update={"steps": 2, "pool": 4, "batch": 2}))
    learner, row = table7.Learner(), table7.ROWS[1]
    table7.execute(learner, row, 0)
    assert learner.started.cache_info().misses == 1
    [found] = table7.read(row)
    assert found["start"]["attentions"] == 3 and found["start"]["calibration"]["steps"] == 3 * 2
    tuned = [found["budgets"][str(budget)] for budget in table7.BUDGETS]
    assert [each["tuning"]["steps"] for each in tuned] == [2, 4]
    assert all(len(each["correct"]) == 2 for each in found["budgets"].values())
    assert f"| {row.label} | " in table7.markdown()


def test_table_7s_commands_go_from_the_prompts_to_the_scores(modules: dict[str, ModuleType]) -> None:
    """Both benchmarks are drawn by every row, each scored where it was drawn and beside the original's pictures."""
    lines = [line for line in modules["table7"].commands("CAPTIONED") if not line.startswith("#")]
    files = [said["file"] for line in lines[:2] for _, said in parsed(line)]
    rows = [list(parsed(line)) for line in lines[2:]]
    judged = ["generate", "geneval", "generate", "dpg"]
    assert [[name for name, _ in row] for row in rows] == [
        judged,
        ["train", *judged],
        ["train", *judged],
        ["calibrate", *judged],
        ["train", *judged],
    ]
    made: set[str] = set()
    for told in rows:
        made |= {str(said["out"]) for name, said in told if name in ("train", "calibrate")}
        drawn = [said for name, said in told if name == "generate"]
        assert [said["prompts"] for said in drawn] == files
        assert all((said["number"], said["steps"], said["guidance"]) == (4, 28, 3.5) for said in drawn)
        assert {said["run"] for said in drawn} <= made | {modules["table7"].HOST}
        scored = [said["folder"] for name, said in told if name in ("geneval", "dpg")]
        assert scored == [said["out"] for said in drawn]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_is_one(document: Path) -> None:
    blocks = re.findall(r"```(?:bash|sh|)\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    for line in lines:
        if line.startswith(("lineate ", "accelerate launch ")):
            assert list(parsed(line)), line


def test_every_row_of_every_table_is_a_conversion_and_a_training_that_exist(modules: dict[str, ModuleType]) -> None:
    for name in (*TABLES, *GENERATION):
        table = modules[name].TABLE
        assert all(len(row.runs) == len(row.paper) == len(table.columns) for row in table.rows)
        for run in table.every():
            settings = modules["harness"].read_settings(preset_name=run.preset, assignments=run.conversion_fields())
            assert settings.conversion is not None
            fields = [field for field in run.set if field.startswith("train.")]
            small, generation = modules["small"], modules["generation"]
            config = generation.tuning(run, 0) if name in GENERATION else small.tuning(run.tune, fields, 0)
            assert (config is None) == (run.tune is None)
    shares = [
        generation.tuning(run, 0).epochs * 1562 / generation.HOST_STEPS for run in modules["table6"].TABLE.rows[0].runs if run
    ]
    assert shares == pytest.approx([0.0057, 0.02, 0.1], rel=1e-3)
    names = [run.name for name in TABLES for run in modules[name].TABLE.every()]
    assert len({run for name in TABLES for run in modules[name].TABLE.every()}) == len(set(names))
