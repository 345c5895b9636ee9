"""`lineate calibrate` and `convert` of a denoiser: no pictures, its own sampling; what is left says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.convert import record
from lineate.settings import read_settings

from ..tiny import DIT, dit

QUICK = ("--set", "calibration.steps=3", "--set", "calibration.pool=8", "--steps", "4", "--guidance", "2")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A DiT in the released format."""
    torch.manual_seed(0)
    torch.save({"ema": dit(input_size=8).state_dict()}, tmp_path / "dit.pt")
    shown = ",".join(f"{name}={DIT[name]}" for name in ("patch_size", "hidden_size", "depth", "num_heads"))
    return f"dit:{shown}@{tmp_path / 'dit.pt'}"


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_original_is_converted_and_fitted_along_its_sampling(source: str, tmp_path: Path) -> None:
    done = call("calibrate", source, "--out", tmp_path / "fitted", *QUICK)
    assert done.exit_code == 0, done.output
    run = json.loads((tmp_path / "fitted" / "run.json").read_text())
    assert run["preset"] == "dit5" and run["results"]["images"] == {"calibration": 8}
    assert (run["sampling"]["scheduler"], run["sampling"]["steps"]) == ("ddim", 4)
    read_settings(config=tmp_path / "fitted" / "run.json")  # which says it all again
    assert set(run["results"]["calibration"]["sites"]) == set(record(lineate.load(tmp_path / "fitted")).sites)
    # What was converted before is fitted on its original's sampling: the same pool, the same fit.
    assert call("convert", source, "--out", tmp_path / "plain").exit_code == 0
    assert call("calibrate", tmp_path / "plain", "--out", tmp_path / "again", *QUICK).exit_code == 0
    one, other = (lineate.load(tmp_path / name).state_dict() for name in ("fitted", "again"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_means_nothing_to_a_source_is_refused(source: str, tmp_path: Path) -> None:
    texts = ("--prompts", tmp_path / "texts.txt")
    for arguments, reason in (
        ((source, "--images", tmp_path), "--images means nothing to a denoiser of classes; choices: --scheduler, --steps"),
        ((source, *texts), "--prompts means nothing to a denoiser of classes"),
        ((source, "--image-size", "64"), "--image-size means nothing to a denoiser of classes"),
        ((source, "--steps", "7"), "steps must divide that; got 7"),
        (("timm:test_vit",), "a classifier is calibrated on something; give --images DIR"),
        (("timm:test_vit", "--images", tmp_path, "--guidance", "2"), "--guidance means nothing to a classifier"),
        (("shapes",), "a text-to-image pipeline is calibrated on something; give --prompts FILE"),
        (("shapes", *texts, "--scheduler", "ddim"), "--scheduler means nothing to a text-to-image pipeline"),
        (("shapes", *texts, "--all-channels"), "--all-channels means nothing to a text-to-image pipeline"),
    ):
        refused = call("calibrate", *arguments, "--out", tmp_path / "none")
        assert refused.exit_code == 1 and reason in refused.stderr, refused.output
    assert not (tmp_path / "none").exists()
