"""A DiT of this project in diffusers: the same values from its model, saved and read back by diffusers; what it cannot have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.convert import Conversion, convert, is_new, record
from lineate.export import ExportError
from lineate.generation import pipeline as module
from lineate.generation.classes import Sampling, denoiser, sample
from lineate.generation.pipeline import export_pipeline, transformer

from ..tiny import autoencoder, dit

HALF = Conversion(sites=("blocks.1.attn",), inherit="mlp")


def tiny(**changes: Any) -> nn.Module:
    return dit(**({"input_size": 8, "in_channels": 4, "num_classes": 1000} | changes))


def stirred(conversion: str | Conversion, **changes: Any) -> nn.Module:
    """A DiT, converted, every tensor of a core moved from where it starts."""
    model = convert(tiny(**changes), conversion)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_new(name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 3, 977]), torch.tensor([4, 5, 1000])


@torch.no_grad()
def assert_same(theirs: Any, ours: nn.Module) -> None:
    x, t, y = inputs()
    torch.testing.assert_close(theirs(x, timestep=t, class_labels=y).sample, ours(x, t, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conversion", ["dit5", "lit", "hyena-x", HALF, None], ids=str)
def test_diffusers_model_computes_the_same_and_reloads(conversion: str | Conversion | None, tmp_path: Path) -> None:
    ours = stirred(conversion) if conversion is not None else tiny()
    theirs = transformer(ours)
    assert type(theirs) is DiTTransformer2DModel and not theirs.training
    assert_same(theirs, ours)
    theirs.save_pretrained(tmp_path / "diffusers")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "diffusers")
    assert_same(again, ours)
    assert record(again) == record(theirs)
    lineate.save(theirs, tmp_path / "lineate")
    assert_same(lineate.load(tmp_path / "lineate"), ours)
    with torch.no_grad():  # the test sees the frequencies of the time
        theirs.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 1
        assert not torch.allclose(theirs(*inputs()).sample, ours(*inputs()), atol=1e-3)


def test_the_record_says_what_was_drawn_anew() -> None:
    ours = stirred(HALF)
    found = record(transformer(ours))
    assert found.sites == ("transformer_blocks.1.attn1",)
    drawn = {name for name in found.names("new") if not is_new(name)}
    assert drawn and all(
        name.startswith("transformer_blocks.1.") and ".ff." not in name and ".emb." not in name for name in drawn
    )
    assert found.count("new") == record(ours).count("new")


def test_its_pipeline_makes_our_pictures(tmp_path: Path) -> None:
    """By diffusers' own loop, which guides every channel, from the same noise."""
    ours, vae = stirred("dit5"), autoencoder()
    vae.save_pretrained(tmp_path / "vae")
    lineate.save(ours, tmp_path / "model")
    arguments = ["--format", "diffusers", "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "pipeline")]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), *arguments])
    assert done.exit_code == 0 and "relative error of what is read back" in done.output, done.output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    found = torch.from_numpy(pipe([7], 2.0, noise, num_inference_steps=5, output_type="np").images)
    asked = Sampling(scheduler="ddim", steps=5, guidance=2, guided_channels=None)
    latents = sample(denoiser(ours), [7], [3], asked)
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = CliRunner().invoke(app, ["export", str(tmp_path / "model"), *arguments])
    assert again.exit_code == 1 and "exists; give a folder that does not" in again.output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_size": (8, 6)}, "a grid of 8x6, which is no square"),
        ({"sample_size": (4, 4)}, r"been trained at \[4, 4\], another size"),
        ({"objective": "flow"}, "learned a velocity"),
        ({"mlp_ratio": 2.0}, "mlp_ratio=2, where diffusers has 4"),
        ({"class_dropout_prob": 0.0}, "no null label"),
    ],
)
def test_what_diffusers_cannot_have_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=f"this DiT cannot be diffusers': it has {reason}"):
        transformer(tiny(**changes))


def test_a_folder_that_disagrees_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "transformer", lambda model: transformer(stirred("dit5")))
    with pytest.raises(ExportError, match=r"disagrees by .* nothing was written"):
        export_pipeline(tiny(), tmp_path / "model")
    with pytest.raises(ExportError, match="Linear is no DiT"):
        transformer(nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_process_reads_it_with_lineate_and_fails_loudly_without(tmp_path: Path) -> None:
    export_pipeline(stirred("dit5"), tmp_path / "model")
    for first, expected in (("", "Unknown quantization type, got lineate"), ("import lineate; ", "dit5")):
        code = f"import sys; {first}from diffusers import DiTTransformer2DModel as M\n"
        code += "try: M.from_pretrained(sys.argv[1]); print('dit5')\nexcept ValueError as error: print(error)"
        said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True, check=True)
        assert expected in said.stdout
