"""`lineate train` of a text-to-image pipeline: from captioned pictures to a run that draws; calibrated first, taught, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.convert import is_new, record
from lineate.recipes import RECIPES
from lineate.text2image.pipelines import load_pipeline
from lineate.text2image.shapes import TrainingScenes, find_world

QUICK = ("--set", "train.steps=3", "--set", "train.batch=4", "--set", "train.tracker=none", "--set", "train.precision=no")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of drawn shapes with their captions, eight square and four flat."""
    folder = tmp_path_factory.mktemp("scenes")
    for index, (picture, caption) in enumerate(TrainingScenes(find_world("grid"), 12)):
        shown = to_pil_image(picture)
        (shown if index < 8 else shown.crop((0, 4, 32, 28))).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(caption, encoding="utf-8")
    return folder


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(*arguments: Any) -> str:
    found = call(*arguments)
    *_, last = found.stderr.splitlines()  # after what was said on the way
    assert found.exit_code == 1 and last.startswith("error: "), found.stderr
    return str(last)


@pytest.mark.slow
def test_a_run_learns_and_draws(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = call("train", "shapes", "--data", data, "--out", run, "--preset", "sd35-t5", "--recipe", "sd35-t5", *QUICK)
    assert found.exit_code == 0, found.stderr
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert about["source"] == "shapes" and about["results"]["training"]["steps"] == 3 and about["results"]["training"]["finished"]
    trained = lineate.load(run / "model")
    assert len(record(trained).sites) == 6  # the stand-in has fewer than five blocks, so all of its joint attentions
    before = load_pipeline("shapes").transformer.state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if is_new(name) or not torch.equal(tensor, before[name])}
    assert any(not is_new(name) for name in changed)
    for place in (run, run / "model"):
        out = tmp_path / f"pictures-{place.name}"
        found = call("generate", place, "--prompt", "a red cross", "--steps", "2", "--number", "2", "--out", out)
        assert found.exit_code == 0, found.stderr
    drawn = [sorted((tmp_path / f"pictures-{name}").rglob("*.png")) for name in ("run", "model")]
    assert len(drawn[0]) == 2 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*drawn, strict=True))


@pytest.mark.slow
def test_calibrated_then_taught_by_the_original_alone(data: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a red cross\ntwo squares\n", encoding="utf-8")
    few = ("--set", "calibration.steps=5", "--set", "calibration.pool=16", "--steps", "2")
    found = call("calibrate", "shapes", "--prompts", texts, "--preset", "sd35-t5-all", *few, "--out", tmp_path / "calibrated")
    assert found.exit_code == 0, found.stderr
    taught = ("--set", "train.denoise.taught=1.0", "--recipe", "sd35-t5", *QUICK)
    found = call("train", tmp_path / "calibrated", "--data", data, "--out", tmp_path / "run", *taught)
    assert found.exit_code == 0, found.stderr
    losses = json.loads((tmp_path / "run" / "history.jsonl").read_text(encoding="utf-8").splitlines()[-1])["losses"]
    assert losses["loss"] == losses["teacher"] > 0 and losses["flow"] > 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_never_was(data: Path, tmp_path: Path) -> None:
    asked = ("train", "shapes", "--data", data, "--recipe", "sd35-t5", *QUICK, "--cache", tmp_path / "cache")
    assert call(*asked, "--out", tmp_path / "whole").exit_code == 0
    stopped = ("--out", tmp_path / "parts", "--set", "train.checkpoint_steps=1")
    assert call(*asked, *stopped, "--set", "train.max_steps=2").exit_code == 0
    # Computing blocks again, as the recipe has it, or keeping what they did gives the same weights.
    assert call(*asked, *stopped, "--resume", "--set", "train.grad_checkpointing=false").exit_code == 0
    states = [lineate.load(tmp_path / name / "model").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--set", "train.augment.flip=0.5"), "set train.augment.flip=0"),
        (("--set", "train.distill.logits=1"), "distill is for classifiers"),
        (("--set", "train.batch=13"), "12 pictures do not fill one step of 13"),
        (("--image-size", "72"), "no pictures of about 72x72 px; choices: multiples of 8 from 8 to 64"),
        (("--limit", "3"), "3 pictures do not fill one step of 4"),
        (("--vae", "nowhere"), "vae means nothing to prompted"),
        (("--set", "train.protocol=lora", "--set", 'train.lora.targets=["qkv"]'), "no linear layer is called qkv; choices: 0, 2"),
    ],
)
def test_what_means_nothing_here_is_refused(data: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    asked = ("train", "shapes", "--data", data, "--recipe", "sd35-t5", *QUICK, *arguments, "--out", tmp_path / "run")
    assert reason in refused(*asked)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_is_converted_like_any_source(tmp_path: Path) -> None:
    """To what draws, in the pipeline that it came from."""
    found = call("convert", "shapes", "--preset", "sd35-t5-all", "--out", tmp_path / "converted")
    assert found.exit_code == 0, found.stderr
    assert record(load_pipeline(str(tmp_path / "converted")).transformer).conversion == lineate.preset("sd35-t5-all")


def test_recipes_are_table_9() -> None:
    for name in ("sd35-t5", "sd35-ft"):
        recipe = RECIPES[name]()
        assert (recipe.opt, recipe.lr, recipe.min_lr, recipe.weight_decay, recipe.steps) == ("adamw", 1e-5, 1e-5, 1e-4, 3000)
        assert recipe.batch * 4 == 64 and recipe.warmup_epochs == 0 and recipe.new_lr_multiplier == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--prompt", "a cross", "--classes", "1"), "three ways to say what"),
        (("--prompt", "a cross", "--size", "big"), "--size takes pixels like 1024"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--classes", "1"), "no model; give RUN, or --prompt TEXT"),
        (("--prompt", "a cross", "--scheduler", "ddim"), "--scheduler is for classes, not for texts"),
        (("--prompt", "a cross", "--all-channels"), "--all-channels is for classes, not for texts"),
        (("--prompt", "a cross", "--size", "33"), "no pictures of 33x33 px; choices: sides that are multiples of 8, up to 64"),
        (("--prompt", "a cross", "--size", "32x128"), "no pictures of 32x128 px"),
        (("--prompt", "a cross", "--precision", "int8"), "unknown precision 'int8'; choices: fp32, bf16, fp16"),
    ],
)
def test_generate_refuses_in_one_line(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    assert reason in refused("generate", *arguments, "--grid", tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_the_default_draws_a_grid(tmp_path: Path) -> None:
    asked = ("--prompt", "a red cross", "--prompt", "two squares", "--steps", "2", "--number", "3")
    found = call("generate", *asked, "--grid", tmp_path / "grid.png")
    assert found.exit_code == 0, found.stderr
    from lineate.generation.classes import read

    assert read(tmp_path / "grid.png").shape == (3, 2 * 34 + 2, 3 * 34 + 2)
