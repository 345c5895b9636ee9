"""`lineate train`, from a source and labelled images to RUN/model: what it leaves, resumes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import lineate
from lineate import linearize
from lineate.cli.app import app
from lineate.convert import is_new, record
from lineate.evaluate.top1 import Top1, top_k
from lineate.report.run import load_run
from lineate.settings import SettingsError, read_settings
from lineate.sources import Source
from lineate.train import classify
from lineate.train.config import TrainConfig

from .tiny import VISION
from .train.conftest import draw_pictures

QUICK = ("--set", "train.batch=8", "--set", "train.workers=0", "--set", "train.tracker=none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures to learn from and twenty to measure on."""
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "train")
    draw_pictures(folder / "test", each=4)
    return folder


@pytest.fixture
def saved(tmp_path: Path, tiny_vit: Callable[..., nn.Module]) -> Path:
    """A converted classifier of five classes, as a SOURCE."""
    return lineate.save(lineate.convert(tiny_vit()), tmp_path / "saved")


@pytest.fixture
def unconverted(monkeypatch: pytest.MonkeyPatch, tiny_vit: Callable[..., nn.Module]) -> str:
    """A SOURCE that is not converted yet."""

    def load(text: str, *, image_size: int | None = None, scratch: int | None = None) -> Source:
        torch.manual_seed(0)
        return Source(tiny_vit(), text, (0.5,) * 3, (0.5,) * 3, 32, 8)

    monkeypatch.setattr(linearize, "load_source", load)
    return "tiny"


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lineate")


def done(*arguments: Any) -> Any:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: Any) -> str:
    result = call(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    lines = str(result.stderr).splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in result.output
    return lines[-1]


def equal(one: Path, other: Path) -> bool:
    a, b = (lineate.load(path / "model").state_dict() for path in (one, other))
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_baseline_from_scratch_can_be_converted_afterwards(tmp_path: Path, data: Path) -> None:
    baseline, command = tmp_path / "baseline", ("train", "timm:test_vit", "--scratch", "--image-size", 32, "--data", data)
    done(
        *command, *QUICK, "--epochs", 1, "--recipe", "deit", "--preset", "softmax", "--set", "class_token=drop", "--out", baseline
    )
    kept = record(lineate.load(baseline / "model"))
    assert kept.conversion.keeps_softmax and "cls_token" in kept.names("dropped")
    done("train", baseline / "model", "--data", data, *QUICK, "--epochs", 1, "--preset", "t5-paper", "--out", tmp_path / "t5")
    assert len(record(lineate.load(tmp_path / "t5" / "model")).sites) == len(kept.sites)
    assert "only timm:NAME" in refused("train", baseline / "model", "--scratch", "--data", data, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_from_a_source_to_a_trained_model(tmp_path: Path, unconverted: str, data: Path) -> None:
    out = tmp_path / "run"
    command = (
        "train",
        unconverted,
        "--data",
        data,
        "--out",
        out,
        "--preset",
        "t5-2layer",
        "--recipe",
        "t5-freeze",
        "--epochs",
        3,
    )
    result = done(*command, *QUICK, "--calibrate-on", data / "test", "--set", "calibration.steps=2", "--seed", 5)
    assert "epoch 3/3: loss" in result.stderr and "calibrating 2 sites" in result.stderr
    run = json.loads((out / "run.json").read_text())
    held_out = Top1.model_validate(run["results"]["held_out"])
    assert held_out.images == 20 and f"{100 * held_out.top1.value:.2f}" in result.stdout
    training = run["results"]["training"]
    assert (training["steps"], training["images"], len(training["history"])) == (15, 120, 3)
    assert set(training["history"][-1]["metrics"]) == {"top1", "test_loss"}
    config = TrainConfig.model_validate(run["config"]["train"])
    assert (config.protocol, config.epochs, config.warmup_epochs, config.seed) == ("freeze", 3, 0.5, 5)
    assert (run["preset"], run["recipe"], run["seed"], run["source"]) == ("t5-2layer", "t5-freeze", 5, "tiny")
    assert run["results"]["calibration"]["steps"] == 4
    model = lineate.load(out / "model")
    assert record(model).conversion.mixer.model_dump()["inner"] == "2layer"
    assert training["learning"] == sum(p.numel() for name, p in model.named_parameters() if is_new(name))
    # A run.json says it all again.
    again = tmp_path / "again"
    done("train", unconverted, "--data", data, "--out", again, "--config", out / "run.json", "--calibrate-on", data / "test")
    assert equal(out, again)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, saved: Path, data: Path) -> None:
    command = ("train", saved, "--data", data, *QUICK, "--epochs", 2)
    whole, part = tmp_path / "whole", tmp_path / "part"
    done(*command, "--out", whole)
    done(*command, "--out", part, "--set", "train.max_steps=7")
    assert not equal(whole, part)
    assert "holds a run; pass --resume to go on with it, or --overwrite" in refused(*command, "--out", part)
    assert "resuming from" in done(*command, "--out", part, "--resume").stderr
    assert equal(whole, part)
    assert len((part / "history.jsonl").read_text().splitlines()) == 3
    assert "config.lr was" in refused(*command, "--out", part, "--resume", "--set", "train.lr=1")
    done(*command, "--out", part, "--overwrite", "--set", "train.max_steps=1")
    assert len((part / "history.jsonl").read_text().splitlines()) == 1
    assert "give one of them" in refused(*command, "--out", part, "--overwrite", "--resume")


def test_a_run_keeps_the_size_that_it_was_trained_at(tmp_path: Path, saved: Path, data: Path) -> None:
    run = tmp_path / "run"
    command = ("train", saved, "--data", data, *QUICK, "--set", "train.max_steps=1")
    done(*command, "--image-size", 24, "--out", run)
    assert json.loads((run / "run.json").read_text())["config"]["image_size"] == 24
    assert "data.size was 24 and is 32" in refused(*command, "--image-size", 32, "--out", run, "--resume")
    assert "split test, at 24 px" in done("evaluate", run, "--data", data).stderr
    assert "split test, at 32 px" in done("evaluate", run, "--data", data, "--image-size", 32).stderr
    done("train", run, *command[2:], "--out", tmp_path / "more")
    assert json.loads((tmp_path / "more" / "run.json").read_text())["config"]["image_size"] == 24


def test_what_a_killed_process_was_writing_is_no_obstacle(tmp_path: Path, saved: Path, data: Path) -> None:
    """Half a model, an empty folder; a file of somebody else's is none of ours, whatever its name begins with."""
    run = tmp_path / "run"
    command = ("train", saved, "--data", data, *QUICK, "--out", run, "--set", "train.max_steps=1")
    run.mkdir()
    assert "pass --overwrite" in refused(*command)
    done(*command, "--resume")
    for more in ("--resume", "--overwrite"):
        (run / ".model.0123abcd").mkdir()
        (run / ".model.0123abcd" / "model.safetensors").touch()
        (run / ".run.json.0123abcd").touch()
        done(*command, more)
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
    (run / ".modelling").touch()
    done(*command, "--resume")
    assert "holds '.modelling', which is no part of a run" in refused(*command, "--overwrite")


def test_what_is_no_run_is_not_replaced(tmp_path: Path, saved: Path, data: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    for more in ((), ("--overwrite",), ("--resume",)):
        refused("train", saved, "--data", data, "--out", tmp_path / "run", *more)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, saved: Path, data: Path) -> None:
    out = tmp_path / "run"
    command = ("train", saved, "--out", out, "--data")
    two = tmp_path / "two"
    for split in ("train", "test"):
        draw_pictures(two / split, each=1)
        for label in (2, 3, 4):
            (two / split / f"class{label}" / "0.png").unlink()
            (two / split / f"class{label}").rmdir()
    assert "has 2 classes (class0, class1), and the model has 5 classes" in refused(*command, two)
    assert "no split to measure on" in refused(*command, data / "train")
    assert "are not those of" in refused(*command, data, "--held-out-data", two / "test")
    assert "do not fill one step of 128" in refused(*command, data)
    assert "no linear layer is called to_q" in refused(
        *command, data, *QUICK, "--recipe", "t5-lora", "--set", 'train.lora.targets=["to_q"]'
    )
    assert "unknown recipe 'best'; choices: t5, t5-freeze" in refused(*command, data, "--recipe", "best")
    assert "unknown field 'train.warmup'; choices: " in refused(*command, data, "--set", "train.warmup=1")
    assert "--set mixer.inner" in refused(*command, data, "--set", "mixer.inner=2layer")
    assert "no CUDA device" in refused(*command, data, "--device", "cuda") or torch.cuda.is_available()
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "linearize"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.opt=foo",), "opt: unknown optimiser 'foo'; choices: "),
        (("train.augment.auto_augment=foo",), "augment.auto_augment: timm does not understand 'foo'"),
        (("train.tracker=foo",), "tracker: unknown tracker 'foo'; choices: none, "),
        (("train.tracker=wandb",), "tracker: wandb is not installed; choices here: none, tensorboard"),
        (("train.protocol=lora", 'train.lora.targets=["foo"]'), "lora.targets: no linear layer is called foo; choices: "),
        (("train.protocol=freeze", "mixer.name=softmax", "locality=none"), "this VisionTransformer has none; choices: ft, lora"),
    ],
)
def test_bad_settings_are_found_before_any_long_work(
    tmp_path: Path, unconverted: str, data: Path, monkeypatch: pytest.MonkeyPatch, command: str, settings: tuple[str, ...],
    words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(linearize, "calibrate", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr("lineate.train.loop.get_available_trackers", lambda: ["tensorboard"])
    photographs = ("--calibrate-on" if command == "train" else "--images", data / "test")
    asked = [word for setting in settings for word in ("--set", setting)]
    assert words in refused(command, unconverted, *photographs, "--data", data, *QUICK, "--out", tmp_path / "run", *asked)
    assert not (tmp_path / "run").exists()


def test_linearize_trains_after_it_calibrated(
    tmp_path: Path, unconverted: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearize, "draw", lambda *_: [])  # most of a run's time at this size
    monkeypatch.setattr(linearize, "REPEATS", 3)
    command = ("linearize", unconverted, "--images", data / "test", "--out", tmp_path / "run", "--sizes", "32")
    quick = ("--set", "calibration.steps=2", "--set", "calibration.pool=4")
    assert "--epochs is for training, which needs --data" in refused(*command, "--epochs", 1)
    assert "train.lr cannot be set where nothing is trained" in refused(*command, "--set", "train.lr=1")
    assert "--resume is for training, which needs --data" in refused(*command, "--resume")
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    (broken / "test" / "class1" / "0.png").write_text("no picture")
    training = (*quick, *QUICK, "--data", broken, "--epochs", 1, "--recipe", "t5-freeze")
    printed = done(*command, *training)
    assert "top-1 %" in printed.stdout and "McNemar's exact p" in printed.stdout
    assert f"skipped 1 unreadable: {broken / 'test' / 'class1' / '0.png'}" in printed.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert load_run(tmp_path / "run").results.fidelity is not None
    assert run["results"]["training"]["steps"] == 5
    assert run["results"]["held_out"]["original"]["images"] == run["results"]["held_out"]["converted"]["images"] == 19
    assert run["results"]["held_out"]["p"] <= 1 and run["config"]["train"]["protocol"] == "freeze"
    # Stopped in the middle it goes on from there, with the calibration as it was.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 were launched; many train: accelerate launch -m lineate train" in refused(*command, *training, "--overwrite")
    monkeypatch.delenv("WORLD_SIZE")
    whole = lineate.load(tmp_path / "run" / "model").state_dict()
    stopped = (*training, "--set", "train.checkpoint_steps=1")
    done(*command, *stopped, "--set", "train.max_steps=3", "--overwrite")
    assert "pass --resume to go on with it" in refused(*command, *stopped)
    with monkeypatch.context() as patched:
        patched.setattr(linearize, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
        assert "resuming from" in done(*command, *stopped, "--resume").stderr
    resumed = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert resumed["calibration"]["sites"] == run["results"]["calibration"]["sites"] and resumed["training"]["steps"] == 5
    assert all(torch.equal(tensor, whole[name]) for name, tensor in lineate.load(tmp_path / "run" / "model").state_dict().items())
    done(*command, *quick, "--overwrite")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path, data: Path) -> None:
    """One of transformers', whose mask token never gets a gradient; nothing is warned of, and the token stays as it is."""
    host = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VISION, num_labels=5)).eval()
    host.config.image_mean, host.config.image_std = [0.5] * 3, [0.5] * 3
    with torch.no_grad():
        host.dinov2.embeddings.mask_token.fill_(1)
    saved = lineate.save(lineate.convert(host), tmp_path / "saved")
    arguments = ["train", str(saved), "--data", str(data), "--out", str(tmp_path / "run"), *QUICK, "--epochs", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lineate"]
    done_ = subprocess.run(
        [*launcher, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done_.returncode == 0, done_.stderr
    assert "no gradient reaches dinov2.embeddings.mask_token; left as they are" in done_.stderr
    assert "Warning" not in done_.stderr
    assert lineate.load(tmp_path / "run" / "model").get_parameter("dinov2.embeddings.mask_token").eq(1).all()
    assert done_.stderr.count("epoch 1/1") == 1 and done_.stdout.count("model:") == 1
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["results"]["training"]["steps"], run["results"]["training"]["images"]) == (2, 32)
    assert run["results"]["held_out"]["images"] == 20


def test_settings_of_a_training() -> None:
    set_ = ("train.augment.mixup=0.2", "train.batch=16", "train.distill.logits=1")
    found = read_settings(trains=True, recipe="t5", epochs=6, assignments=set_, seed=3)
    assert found.train is not None and found.recipe == "t5"
    assert (found.train.epochs, found.train.warmup_epochs, found.train.batch, found.train.seed) == (6, 1, 16, 3)
    assert (found.train.augment.mixup, found.train.augment.cutmix, found.train.distill.logits) == (0.2, 1.0, 1)
    assert read_settings().train is None


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.augment.mixap=1", "unknown field 'train.augment.mixap'; choices: crop, "),
        ("train.lr=-1", "train.lr: cannot be -1: input should be greater than 0"),
        ("train.precision=fp8", "train.precision: unknown value 'fp8'; choices: 'no', 'tf32', 'bf16' or 'fp16'"),
        ("train.batch=7", "train: batch must be even"),
        ("train=fast", "train has fields, protocol, "),
        ("train.lr.x=1", "train.lr is 2e-05 and has no fields"),
    ],
)
def test_a_wrong_setting_names_its_choices(assignment: str, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + words.replace(".", r"\.")):
        read_settings(trains=True, assignments=(assignment,))


def test_unreadable_pictures_of_both_splits_are_counted_once_and_across_a_resume(
    tmp_path: Path, saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the last epoch measured the model that stays, it is not measured again."""
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    names = {*(f"train/class{label}/{label}.png" for label in range(5)), "test/class1/0.png"}
    for name in names:
        (broken / name).write_text("no picture")
    measured: list[int] = []

    def measure(*arguments: Any, **more: Any) -> Any:
        measured.append(1)
        return top_k(*arguments, **more)

    monkeypatch.setattr(classify, "top_k", measure)
    once = ("--set", "train.augment.repeats=1", "--epochs", 2)
    command = ("train", saved, "--data", broken, *QUICK, *once, "--out", tmp_path / "run")
    done(*command, "--set", "train.max_steps=8")  # the two steps that are left show 16 pictures of 40
    done(*command, "--resume")
    images = json.loads((tmp_path / "run" / "run.json").read_text())["results"]["images"]
    assert (images["train"], images["held_out"]) == (40, 19)
    assert {str(Path(name).relative_to(broken)) for name in images["skipped"]} == names
    assert len(measured) == 3
