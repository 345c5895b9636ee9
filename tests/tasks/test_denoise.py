"""`lineate train` of a denoiser: from an original checkpoint or from nothing, latents or pixels, DDPM or flow, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.convert import is_new, record
from lineate.generation.classes import ABOUT, read
from lineate.models.dit import DiT
from lineate.train.latents import Index, read_index

from ..train.conftest import draw_pictures

QUICK = ("--set", "train.batch=8", "--set", "train.workers=0", "--set", "train.tracker=none")
GEOMETRY = "dit:patch_size=2,hidden_size=24,depth=2,num_heads=3"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures") / "all")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of half the side and four channels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2, layers_per_block=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DiT of five classes in the released format, as a SOURCE."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("released") / "DiT.pt"
    made = DiT(16, 2, 4, 24, 2, 3, num_classes=5)
    torch.nn.init.normal_(made.final_layer.linear.weight, std=0.1)
    torch.save({"ema": made.state_dict(), "model": DiT(16, 2, 4, 24, 2, 3, num_classes=5).state_dict()}, file)
    return f"{GEOMETRY}@{file}"


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def done(*arguments: Any) -> dict[str, Any]:
    """run.json of a run that went well."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    out = Path(arguments[arguments.index("--out") + 1])
    assert result.stdout.strip() == f"model: {out / 'model'}"
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def refused(*arguments: Any) -> str:
    result = call(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    return str(result.stderr).splitlines()[-1]


def sampled(run: Path, out: Path, *arguments: Any) -> tuple[str, tuple[int, ...]]:
    """How pictures of a run were drawn, and their shape."""
    result = CliRunner().invoke(
        app, ["generate", str(run), "--out", str(out), "--number", "1", "--steps", "2", "--guidance", "1", *map(str, arguments)]
    )
    assert result.exit_code == 0, result.stderr
    return json.loads((out / ABOUT).read_text())["sampling"]["scheduler"], tuple(read(out / "00000.png").shape)


def weights(run: Path) -> dict[str, Tensor]:
    return lineate.load(run / "model").state_dict()


def test_a_dit5_from_an_original_through_an_autoencoder(tmp_path: Path, data: Path, vae: Path, original: str) -> None:
    out = tmp_path / "run"
    command = (original, "--data", data, "--vae", vae, *QUICK, "--epochs", 1, "--set", "train.ema=0.5")
    run = done(*command, "--out", out)
    assert (run["preset"], run["recipe"], run["source"]) == ("dit5", "dit5", original)
    assert set(run["results"]["training"]["history"][0]["losses"]) == {"loss", "mse", "vlb"}
    config = run["config"]["train"]
    assert (config["lr"], config["min_lr"], config["new_lr_multiplier"], config["ema_warmup"]) == (1e-4, 1e-4, 2, False)
    assert run["config"]["image_size"] == 32 and run["results"]["held_out"] is None
    assert read_index(tmp_path / "run.cache", Index).size == 32  # latents of 16, twice as many pixels
    model = lineate.load(out / "model")
    assert record(model).conversion == lineate.preset("dit5").model_copy(update={"seed": 0})
    before = torch.load(original.partition("@")[2])["ema"]
    moved = [float((tensor - before[name]).abs().max()) for name, tensor in model.state_dict().items() if name in before]
    assert 0 < max(moved) < 1e-3  # it began at the averaged weights, not at the others
    # Part of the run and then the rest is the whole run; the cache made before is taken again.
    part = tmp_path / "part"
    done(*command, "--cache", tmp_path / "run.cache", "--out", part, "--set", "train.max_steps=2")
    done(*command, "--cache", tmp_path / "run.cache", "--out", part, "--resume")
    assert all(torch.equal(tensor, weights(part)[name]) for name, tensor in weights(out).items())


def test_a_flow_of_pixels_from_nothing_and_its_conversions(tmp_path: Path, data: Path) -> None:
    host, flow = tmp_path / "host", ("--set", "train.denoise.objective=flow")
    common = ("--data", data, *QUICK, *flow, "--cache", tmp_path / "cache", "--epochs", 1)
    scratch = (GEOMETRY, "--scratch", "--image-size", 16, *common, "--preset", "softmax", "--recipe", "dit")
    run = done(*scratch, "--out", host)
    assert set(run["results"]["training"]["history"][0]["losses"]) == {"loss"}
    softmax = record(lineate.load(host / "model"))
    assert softmax.conversion.keeps_softmax and softmax.host is not None
    arguments = softmax.host["arguments"]
    assert (arguments["in_channels"], arguments["input_size"], arguments["num_classes"]) == (3, [16, 16], 5)
    assert not arguments["learn_sigma"]
    done(*scratch, "--out", tmp_path / "again")
    assert all(torch.equal(tensor, weights(tmp_path / "again")[name]) for name, tensor in weights(host).items())
    # It says that it learned a velocity: nothing asks it for noise, nor teaches it that.
    assert "the model learned flow, and ddpm is another objective" in refused(
        host, "--data", data, *QUICK, "--out", tmp_path / "x"
    )
    assert sampled(host, tmp_path / "own") == ("flow", (3, 16, 16))
    assert sampled(host, tmp_path / "wide", "--size", "16x24") == ("flow", (3, 16, 24))
    with pytest.raises(AssertionError, match="the model learned flow, not what ddim asks; choices: flow"):
        sampled(host, tmp_path / "no", "--scheduler", "ddim")
    # A trained host is a source like any other; a scheme of inheritance, nothing but the new parameters learning, another size.
    other = ("--cache", tmp_path / "larger", "--image-size", 24, "--set", "inherit=mlp", "--set", "train.protocol=freeze")
    done(host, *common, *other, "--out", tmp_path / "mlp")
    assert sampled(tmp_path / "mlp", tmp_path / "larger-drawn") == ("flow", (3, 24, 24))
    converted = record(lineate.load(tmp_path / "mlp" / "model"))
    assert converted.conversion.inherit == "mlp" and "blocks.0.attn.qkv.weight" in converted.names("new")
    state, before = weights(tmp_path / "mlp"), weights(host)
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    assert any(is_new(name) for name in state)


def test_what_does_not_fit_is_one_line_and_leaves_nothing(tmp_path: Path, data: Path, vae: Path, original: str) -> None:
    out = ("--out", tmp_path / "run", "--data", data)
    assert "denoises 4 channels, and pixels, without --vae, gives 3" in refused(original, *out)
    assert "held_out means nothing to denoising" in refused(original, *out, "--vae", vae, "--held-out-data", data)
    assert "vae means nothing to classification" in refused("timm:test_vit", *out, "--vae", vae, "--held-out-data", data)
    assert "limit means nothing to denoising" in refused(original, *out, "--vae", vae, "--limit", 8)
    assert "give --image-size" in refused(GEOMETRY, "--scratch", *out)
    assert "is drawn anew, so it has no file" in refused(original, "--scratch", "--vae", vae, *out)
    assert "unknown argument 'width' of a DiT" in refused("dit:width=3", "--scratch", "--image-size", 16, *out)
    assert "input_size 16x16 is not divisible" in refused("dit:patch_size=3", "--scratch", "--image-size", 16, *out)
    assert "has 5 classes" in refused(GEOMETRY + ",num_classes=2", "--scratch", "--image-size", 16, *out)
    assert "do not fill one step" in refused(original, "--vae", vae, *out, "--set", "train.batch=64")
    assert "distill is for classifiers" in refused(original, "--vae", vae, *out, "--set", "train.distill.logits=1")
    assert "drop_path is for classifiers of timm's" in refused(original, "--vae", vae, *out, "--set", "train.drop_path=0.1")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_pictures_are_told_by_whoever_cached_them(tmp_path: Path, data: Path) -> None:
    """Also where the cache was there, and where the run is resumed; with --strict-data a cache without them is none."""
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    (broken / "class1" / "0.png").write_text("no picture")
    command = (GEOMETRY, "--scratch", "--image-size", 16, "--data", broken, *QUICK, "--epochs", 1, "--cache", tmp_path / "cache")
    for name, more in (("made", ()), ("part", ("--set", "train.max_steps=2")), ("part", ("--resume",))):
        skipped = done(*command, "--out", tmp_path / name, *more)["results"]["images"]["skipped"]
        assert [Path(file) for file in skipped] == [broken / "class1" / "0.png"]
    assert "0.png cannot be read as a picture" in refused(*command, "--out", tmp_path / "no", "--strict-data")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path, data: Path) -> None:
    """One process that accumulates over two batches makes the same steps, but for the order in which gradients are summed."""
    common = [
        GEOMETRY, "--scratch", "--image-size", "16", "--data", data, "--preset", "dit5", "--recipe", "dit",
        "--cache", tmp_path / "cache", "--epochs", "1", *QUICK, "--set", "train.batch=4",
        "--set", "train.opt=sgd", "--set", "train.lr=0.1", "--set", "train.ema=0.5",
    ]  # fmt: skip
    done(*common, "--set", "train.accumulate=2", "--out", tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lineate", "train"]
    ran = subprocess.run(
        [*launcher, *map(str, common), "--out", str(tmp_path / "two")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    assert not torch.equal(one["final_layer.linear.weight"], torch.zeros_like(one["final_layer.linear.weight"]))
