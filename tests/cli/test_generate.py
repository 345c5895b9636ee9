"""`lineate generate`, from a saved model to pictures; and each bad input: one clear line, nothing written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.generation.classes import read
from lineate.models import dit
from lineate.models.dit import DiT

QUICK = ("--steps", "2", "--classes", "3,1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a tiny DiT⁵ of 4 classes that makes pixels, 8×8."""
    torch.manual_seed(0)
    model = DiT(8, 2, 3, 24, 2, 2, num_classes=4)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    run = tmp_path_factory.mktemp("saved")
    lineate.save(lineate.convert(model, "dit5"), run / "model")
    return run


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def refused(*arguments: Any) -> str:
    found = call(*arguments)
    assert found.exit_code == 1 and re.fullmatch(r"error: [^\n]+\n", found.stderr), found.stderr
    return str(found.stderr)


def test_a_grid_has_a_column_a_class(saved: Path, tmp_path: Path) -> None:
    found = call(saved, *QUICK, "--grid", tmp_path / "shown" / "grid.png", "--out", tmp_path / "all", "--batch", "3")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.strip().startswith(f"pictures: {tmp_path / 'all'}; grid: ")
    files = sorted((tmp_path / "all").glob("*.png"))
    assert len(files) == 8
    shown = read(tmp_path / "shown" / "grid.png")
    assert shown.shape == (3, 4 * 10 + 2, 2 * 10 + 2)
    assert torch.equal(shown[:, 12:20, 2:10], read(files[2]))


def test_a_grid_alone_leaves_nothing_else_and_is_the_same(saved: Path, tmp_path: Path) -> None:
    for name, where in (("a", saved), ("b", saved / "model")):
        assert call(where, *QUICK, "--number", "2", "--grid", tmp_path / f"{name}.png", "--seed", "5").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing to write; choices: --grid FILE.png, --out DIR, of classes --npz FILE.npz, or several"),
        (("--npz", "G"), "--npz names a file *.npz, got 'grid.png'"),
        (("--npz", "a.npz", "--prompt", "a cross"), "--npz is for classes, not for texts"),
        (("--grid", "G", "--classes", "1,cat"), "whole numbers between commas"),
        (("--grid", "G", "--classes", "4"), "no class 4; the model has classes 0 to 3"),
        (("--grid", "G", "--scheduler", "ddim", "--steps", "7"), "steps must divide that; got 7"),
        (("--grid", "G", "--scheduler", "euler"), "'ddpm', 'ddim' or 'flow'"),
        (("--grid", "G", "--vae", "nowhere"), "nowhere holds no config.json"),
    ],
)
def test_bad_options_are_one_line(saved: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    given = [str(tmp_path / "grid.png") if argument == "G" else argument for argument in arguments]
    assert reason in refused(saved, *given)
    assert not list(tmp_path.iterdir())


def test_what_stands_there_is_not_replaced_unasked(saved: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    Image.new("RGB", (2, 2)).save(grid)
    assert "exists; pass --overwrite to replace it" in refused(saved, *QUICK, "--grid", grid)
    assert call(saved, *QUICK, "--grid", grid, "--overwrite").exit_code == 0
    assert read(grid).shape == (3, 42, 22)


def test_all_pictures_as_adm_takes_them(saved: Path, tmp_path: Path) -> None:
    assert call(saved, *QUICK, "--out", tmp_path / "all", "--npz", tmp_path / "new" / "all.npz").exit_code == 0
    stored = np.load(tmp_path / "new" / "all.npz")["arr_0"]
    files = sorted((tmp_path / "all").glob("*.png"))
    assert np.array_equal(stored, np.stack([np.array(Image.open(file)) for file in files]))
    assert call(saved, *QUICK, "--npz", tmp_path / "alone.npz").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "alone.npz")["arr_0"], stored)
    assert "alone.npz exists; pass --overwrite" in refused(saved, *QUICK, "--npz", tmp_path / "alone.npz")


def test_an_original_makes_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the released checkpoints' format, through an autoencoder in diffusers' own."""
    from diffusers import AutoencoderKL

    size = {"patch_size": 2, "hidden_size": 24, "depth": 1, "num_heads": 3}
    monkeypatch.setitem(dit.DIT_MODELS, "DiT-T/2", size)
    torch.save({"ema": DiT(8, num_classes=4, **size).state_dict()}, tmp_path / "dit.pt")
    AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2, layers_per_block=1,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    source = f"dit:DiT-T/2@{tmp_path / 'dit.pt'}"
    assert call(source, *QUICK, "--number", "2", "--out", tmp_path / "all", "--vae", tmp_path / "vae").exit_code == 0
    assert read(tmp_path / "all" / "00001.png").shape == (3, 16, 16)
    assert "latents of 4 channels, which need an autoencoder" in refused(source, *QUICK, "--out", tmp_path / "none")


def test_a_classifier_makes_no_pictures(tiny_vit: Any, tmp_path: Path) -> None:
    lineate.save(lineate.convert(tiny_vit(), "t5"), tmp_path / "model")
    assert "holds a VisionTransformer, which is no denoiser" in refused(tmp_path / "model", "--grid", tmp_path / "g.png")
