"""docs/dit.md's commands, one after the other: from an original's file to a tuned DiT⁵, its pictures and their figures."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

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

PAGE = Path(__file__).parents[2] / "docs" / "dit.md"
SMALLER = {"hidden_size": 24, "depth": 2, "num_heads": 3}
# What makes each command short enough to be run here; all else is as on the page.
SHORTER = {
    "generate": "--steps 2", "calibrate": "--steps 4 --set calibration.steps=2 --set calibration.pool=4",
    "train": "--set train.max_steps=2 --set train.batch=8 --set train.workers=0 --set train.tracker=none", "fid": "",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_from_the_original_to_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    monkeypatch.setitem(dit.DIT_MODELS, "DiT-XL/2", DIT_MODELS["DiT-XL/2"] | SMALLER)
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

    block = re.search(r"```\n(lineate generate.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    commands = [
        shlex.split(line.replace("accelerate launch -m ", "").replace(" --device cuda", "")) for line in block[1].splitlines()
    ]
    assert [command[1] for command in commands] == ["generate", "calibrate", "generate", "train", "generate", "fid"]
    for _, name, *arguments in commands:
        shown = [{"50000": "12", "207,360,387,974": "0,1,2,3"}.get(word, word) for word in arguments]
        done = CliRunner().invoke(app, [name, *shown, *SHORTER[name].split()])
        assert done.exit_code == 0, (name, done.output)
    assert done.stdout.startswith("FID ") and "12 pictures" in done.stdout
    assert read(Path("original.png")).shape == read(Path("calibrated.png")).shape
    assert record(lineate.load("tuned/model")).conversion == lineate.preset("dit5")
