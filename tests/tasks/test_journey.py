"""docs/dit.md's commands and Python, one after the other, of which README.md has the first ones, word for word.

From an original's file to a tuned DiT⁵, its pictures and their figures, and a pipeline of diffusers; and from nothing.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.convert import record
from lineate.evaluate import fid
from lineate.evaluate.fid import INCEPTION, Extractor
from lineate.generation.classes import read
from lineate.models import dit
from lineate.models.dit import DIT_MODELS, DiT

from ..train.conftest import draw_pictures

ROOT = Path(__file__).parents[2]
SMALLER = {"hidden_size": 24, "depth": 2, "num_heads": 3}
# What makes each command short enough to be run here; all else is as on the page.
SHORTER = {
    "generate": "--steps 2", "calibrate": "--steps 4 --set calibration.steps=2 --set calibration.pool=4",
    "train": "--set train.max_steps=2 --set train.batch=8 --set train.workers=0 --set train.tracker=none", "fid": "",
    "export": "",
}  # fmt: skip
WORDS = {
    "50000": "12", "207,360,387,974": "0,1,2,3", "DiT-S/2": "DiT-S/2 --image-size 16", "CIFAR10": "IMAGENET",
    "([207]": "([2], guidance_scale=1", "steps=50": "steps=2",
}  # fmt: skip


def pieces(page: str) -> list[tuple[str, str]]:
    """The blocks of a page: each "python" or "" for commands, and its text."""
    return re.findall(r"^```(python|)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def command(line: str) -> str:
    """Run a line of the page; what it prints."""
    words = shlex.split(line.replace("accelerate launch -m ", "").replace(" --device cuda", ""))
    done = CliRunner().invoke(app, [*words[1:], *SHORTER[words[1]].split()])
    assert done.exit_code == 0, (line, done.output)
    return done.stdout


def test_the_readme_begins_as_the_page_does() -> None:
    lines = [line for kind, text in pieces("README.md") for line in text.splitlines() if "DiT-XL" in line or " dit5 " in line]
    assert [line.split()[1] for line in lines] == ["calibrate", "generate"]
    assert set(lines) <= set(pieces("docs/dit.md")[0][1].splitlines())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_from_the_original_to_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    for name in ("DiT-XL/2", "DiT-S/2"):
        monkeypatch.setitem(dit.DIT_MODELS, name, DIT_MODELS[name] | SMALLER)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    original = DiT(8, num_classes=5, **dit.DIT_MODELS["DiT-XL/2"])
    torch.nn.init.normal_(original.final_layer.linear.weight, std=0.1)
    torch.save(original.state_dict(), "DiT-XL-2-256x256.pt")
    AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2, layers_per_block=1,
    ).save_pretrained("VAE")  # fmt: skip
    draw_pictures(Path("IMAGENET"))
    np.savez("VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(INCEPTION), sigma=np.eye(INCEPTION))
    extractor = Extractor(
        "inception", lambda x: x.float().mean((-1, -2, -3))[:, None] * torch.linspace(0, 0.01, INCEPTION + 1008)
    )
    monkeypatch.setattr(fid, "find_extractor", lambda *args, **more: extractor)

    kinds: list[str] = []
    names: dict[str, Any] = {}
    printed: dict[str, str] = {}
    for kind, text in pieces("docs/dit.md"):
        kinds.append(kind)
        for there, here in WORDS.items():
            text = text.replace(there, here)
        if kind == "python":
            exec(text, names)
        for line in text.splitlines() if kind == "" else ():
            printed[line.split(" -m ")[-1].removeprefix("lineate ").split()[0]] = command(line)
    assert kinds == ["", "", "python", ""] and set(printed) == {"generate", "calibrate", "train", "fid", "export"}
    assert printed["fid"].startswith("FID ") and "12 pictures" in printed["fid"]
    assert read(Path("original.png")).shape == read(Path("calibrated.png")).shape
    assert record(lineate.load("tuned/model")).conversion == lineate.preset("dit5")
    assert record(names["pipe"].transformer).conversion.core() == lineate.preset("dit5").core() and names["image"].size == (
        16,
        16,
    )
    for folder in ("dit-s", "small"):
        assert record(lineate.load(f"{folder}/model")).conversion.keeps_softmax
