"""Killed at any moment and resumed, a run ends in the weights of one that was never stopped: `fit`, on one process and across
two, and `lineate train` of classes, after a calibration, of a denoiser, and of a text-to-image pipeline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torchvision.transforms.functional import to_pil_image

import lineate
from lineate.text2image.shapes import TrainingScenes, find_world

from .conftest import draw_pictures

WORKER = Path(__file__).with_name("killed.py")
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}

pytestmark = pytest.mark.slow


def run(processes: int, moments: str, *said: Any, kind: str = "plain") -> tuple[list[int], str]:
    """The exit statuses of runs that die at these moments, and what they said; see the worker for moments and arguments.

    Of several processes the first to die takes the others along.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (SHARDED if kind == "sharded" else {})
    command = [sys.executable, str(WORKER), str(processes), moments, *map(str, said)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")], done.stderr


def fitted(processes: int, folder: Path, out: Path, moments: str, kind: str = "plain") -> list[int]:
    return run(processes, moments, "fit", kind, folder, out, kind=kind)[0]


def same(one: Path, other: Path) -> bool:
    """Whether two runs left the same weights."""
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture(scope="module")
def never_stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert fitted(1, folder, out, "whole") == [0]
    return out


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("held-out") / "all", each=2)


def test_killed_at_any_moment_and_resumed(folder: Path, never_stopped: Path, tmp_path: Path) -> None:
    """Killed before any checkpoint, within an epoch, while one is written, while an old one is removed; again and again."""
    *died, ended = fitted(1, folder, tmp_path, "step:1,step:7,saving:8,removing:6,step:13,saving:20,never")
    assert died == [-signal.SIGKILL] * 6 and ended == 0
    assert same(tmp_path, never_stopped)
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_killed_and_resumed_across_two_processes(folder: Path, never_stopped: Path, tmp_path: Path, kind: str) -> None:
    """Replicated (DDP) and sharded (FSDP2) over gloo."""
    whole, *died, ended = fitted(2, folder, tmp_path / "{run}", "whole,step:3,saving:6,never", kind)
    assert whole == ended == 0 and all(died)
    assert same(tmp_path / "part", tmp_path / "whole")
    assert not same(tmp_path / "part", never_stopped)


SHORT = ("train.batch=4", "train.workers=0", "train.tracker=none", "train.ema=0.9", "train.checkpoint_steps=3", "train.keep=2")
SET = [word for assignment in SHORT for word in ("--set", assignment)]
KILLED = -signal.SIGKILL


def test_the_command_killed_at_any_moment_and_resumed(folder: Path, held_out: Path, tmp_path: Path) -> None:
    """A classifier drawn anew, with drop path, the recipe's augmentation, and an average; killed while it leaves its model."""
    command = (
        "train", "timm:test_vit", "--scratch", "--image-size", 32, "--data", folder, "--held-out-data", held_out, "--epochs", 2,
        *SET, "--set", "train.drop_path=0.2", "--resume", "--out", tmp_path / "{run}",
    )  # fmt: skip
    ends, said = run(1, "whole,step:2,saving:9,removing:3,leaving,telling,never", *command)
    assert ends == [0, *[KILLED] * 5, 0], said
    assert same(tmp_path / "part", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "run.json").read_text())["results"] for name in ("whole", "part")]
    assert results[0]["held_out"] == results[1]["held_out"]
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["checkpoints", "history.jsonl", "model", "run.json"]


def test_the_command_does_not_calibrate_again(folder: Path, held_out: Path, tmp_path: Path) -> None:
    """Killed before the first step, but after the calibration, it goes on from there."""
    torch.manual_seed(0)
    host = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, dynamic_img_size=True)
    saved = lineate.save(lineate.convert(host), tmp_path / "saved")
    command = (
        "train", saved, "--data", folder, "--held-out-data", held_out, "--epochs", 1, *SET, "--calibrate-on", held_out,
        "--set", "calibration.steps=2", "--set", "calibration.pool=4", "--resume", "--out", tmp_path / "{run}",
    )  # fmt: skip
    ends, said = run(1, "whole,calibrating,step:1,step:5,never", *command)
    assert ends == [0, *[KILLED] * 3, 0], said
    assert said.count("calibrating 2 sites") == 3  # of the part twice, once in vain
    assert same(tmp_path / "part", tmp_path / "whole")
    told = [json.loads((tmp_path / name / "run.json").read_text())["results"]["calibration"] for name in ("whole", "part")]
    assert told[0]["sites"] == told[1]["sites"] and told[1]["steps"] == 4


def test_a_denoisers_command_killed_and_resumed(folder: Path, tmp_path: Path) -> None:
    """Pixels that are cached once; killed while they are, too."""
    command = (
        "train", "dit:patch_size=2,hidden_size=24,depth=2,num_heads=3", "--scratch", "--image-size", 16, "--data", folder,
        "--epochs", 1, *SET, "--resume", "--out", tmp_path / "{run}",
    )  # fmt: skip
    ends, said = run(1, "whole,caching,step:2,step:5,saving:6,leaving,never", *command)
    assert ends == [0, *[KILLED] * 5, 0], said
    assert same(tmp_path / "part", tmp_path / "whole")


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The command that trains the stand-in on eight square and four flat captioned pictures: six batches of two an epoch."""
    folder = tmp_path_factory.mktemp("scenes")
    for index, (picture, caption) in enumerate(TrainingScenes(find_world("grid"), 12)):
        shown = to_pil_image(picture)
        (shown if index < 8 else shown.crop((0, 4, 32, 28))).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(caption, encoding="utf-8")
    less = ("train.steps=9", "train.batch=2", "train.precision=no", "train.opt=sgd", "train.lr=0.01")
    smaller = [word for assignment in less for word in ("--set", assignment)]
    return ("train", "shapes", "--data", folder, "--recipe", "sd35-t5", *SET, *smaller, "--resume")


def test_a_pipelines_command_killed_and_resumed(drawing: tuple[Any, ...], tmp_path: Path) -> None:
    ends, said = run(1, "whole,caching,step:2,saving:6,step:8,leaving,never", *drawing, "--out", tmp_path / "{run}")
    assert ends == [0, *[KILLED] * 5, 0], said
    assert same(tmp_path / "part", tmp_path / "whole")


def test_two_processes_make_ready_and_learn_what_one_does(drawing: tuple[Any, ...], tmp_path: Path) -> None:
    """The same cache, byte for byte; and the same weights, but for the order in which gradients are summed."""
    for processes in (1, 2):
        share = ("--set", f"train.accumulate={2 // processes}", "--out", tmp_path / str(processes))
        ends, said = run(processes, "never", *drawing, *share)
        assert ends == [0], said
    files = [{file.name: file.read_bytes() for file in (tmp_path / f"{n}.cache").iterdir()} for n in (1, 2)]
    assert files[0] == files[1] and len(files[0]) == 4  # two sizes, no text, and the index
    one, two = (load_file(tmp_path / str(n) / "model" / "model.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
