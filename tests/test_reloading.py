"""Converted transformers in diffusers' pipelines: reloaded bit for bit with lineate, never without; what they compose with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lineate
from lineate.convert import ReloadError, core_modules, record
from lineate.families import UnsupportedModelError

from .tiny import autoencoder, sd3, sd3_pipeline, t5

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
}
PROMPT = {"prompt": "a red cat", "num_inference_steps": 2, "height": 8, "width": 16, "max_sequence_length": 12}


def dit_pipeline() -> DiffusionPipeline:
    return DiTPipeline(DiTTransformer2DModel(**SMALL, num_embeds_ada_norm=1000).eval(), autoencoder(), DDIMScheduler())


def pixart_pipeline(cls: Any = PixArtAlphaPipeline, **changes: Any) -> DiffusionPipeline:
    encoder, tokenizer = t5()
    changes |= {"cross_attention_dim": 24, "caption_channels": 20, "use_additional_conditions": False}
    return cls(tokenizer, encoder, autoencoder(), PixArtTransformer2DModel(**SMALL, **changes).eval(), DDIMScheduler())


def sigma_pipeline() -> DiffusionPipeline:
    return pixart_pipeline(PixArtSigmaPipeline, interpolation_scale=2)


def picture(pipeline: Any, **also: Any) -> Tensor:
    """The picture of one seed.

    Weights read from a file are mapped into memory wherever they stand in it, and on CPUs their alignment moves the last bits of
    what is computed, with or without lineate; so they are copied.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.load_state_dict({name: tensor.clone() for name, tensor in part.state_dict().items()}, assign=True)
    pipeline.set_progress_bar_config(disable=True)
    said: dict[str, Any] = PROMPT
    if isinstance(pipeline, DiTPipeline):
        said = {"class_labels": [3], "num_inference_steps": 2}
    elif isinstance(pipeline, PixArtAlphaPipeline | PixArtSigmaPipeline):
        said = PROMPT | {"use_resolution_binning": False, "clean_caption": False}
    images = pipeline(**said, generator=torch.Generator().manual_seed(0), output_type="np", **also).images
    return torch.from_numpy(images)


@pytest.mark.parametrize(
    ("make", "preset"),
    [(sd3_pipeline, "sd35-t5"), (dit_pipeline, "dit5"), (pixart_pipeline, "dit5"), (sigma_pipeline, "dit5")],
    ids=["sd3", "dit", "pixart-alpha", "pixart-sigma"],
)
def test_a_converted_pipeline_reloads_bit_for_bit(make: Any, preset: str, tmp_path: Path) -> None:
    """As a user does it: two lines, and diffusers' own saving and loading."""
    pipeline = make()
    before = picture(pipeline)
    lineate.convert(pipeline.transformer, preset)
    expected = picture(pipeline)
    assert not torch.equal(expected, before)
    pipeline.save_pretrained(tmp_path / "a")
    again = DiffusionPipeline.from_pretrained(tmp_path / "a")
    assert type(again.transformer) is type(pipeline.transformer)
    assert record(again.transformer) == record(pipeline.transformer)
    assert torch.equal(picture(again), expected)
    again.save_pretrained(tmp_path / "b", max_shard_size="20kB")
    assert len(list((tmp_path / "b" / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(tmp_path / "b")), expected)


def test_a_reloaded_transformer_is_no_quantised_one(tmp_path: Path) -> None:
    lineate.convert(sd3(num_layers=1), "sd35-t5").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.float().state_dict().values()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize(
    ("lost", "added", "said"),
    [
        ("attn.core.mixer.w1", None, r"missing transformer_blocks\.0\.attn\.core\.mixer\.w1"),
        ("attn.to_q.weight", None, r"missing transformer_blocks\.0\.attn\.to_q\.weight"),
        (None, "attn.core.mixer.w3", r"unexpected transformer_blocks\.0\.attn\.core\.mixer\.w3"),
    ],
)
def test_weights_that_do_not_fit_the_conversion_are_refused(
    lost: str | None, added: str | None, said: str, tmp_path: Path
) -> None:
    lineate.convert(sd3(num_layers=1), "sd35-t5").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if lost:
        del state[f"transformer_blocks.0.{lost}"]
    if added:
        state[f"transformer_blocks.0.{added}"] = torch.zeros(3, 8, 8)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ReloadError, match=f"does not fit the conversion in its config.json: {said}"):
        SD3Transformer2DModel.from_pretrained(tmp_path)


WITHOUT = """
import sys
from diffusers import DiffusionPipeline, SD3Transformer2DModel
for cls, path in ((DiffusionPipeline, sys.argv[1]), (SD3Transformer2DModel, sys.argv[1] + "/transformer")):
    try:
        cls.from_pretrained(path)
    except ValueError as error:
        print(error)
assert "lineate" not in sys.modules
import lineate
print(len(lineate.record(DiffusionPipeline.from_pretrained(sys.argv[1]).transformer).sites))
"""
WITH = """
import sys
import lineate
assert "diffusers" not in sys.modules
from diffusers import SD3Transformer2DModel
print(len(lineate.record(SD3Transformer2DModel.from_pretrained(sys.argv[1] + "/transformer")).sites))
"""


@pytest.mark.slow
def test_other_processes_reload_it_with_lineate_and_fail_loudly_without(tmp_path: Path) -> None:
    """Whichever of the two libraries is imported first."""
    pipeline = sd3_pipeline()
    lineate.convert(pipeline.transformer, "sd35-t5")
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == ["diffusers", "SD3Transformer2DModel"]

    def say(code: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    *refusals, sites = say(WITHOUT)
    assert len(refusals) == 2 and all("Unknown quantization type, got lineate" in line for line in refusals)
    assert sites == "4" and say(WITH) == ["4"]


def test_model_offload_hooks_run_a_converted_transformer_and_sequential_ones_fail_loudly() -> None:
    """On the CPU, where the hooks move nothing: that they find their way, not that memory is saved."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    model = lineate.convert(sd3(num_layers=1), "sd35-t5")
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.randn(1, 10), torch.tensor([500.0])
    with torch.no_grad():
        expected = model(*inputs).sample
        hooked, hook = cpu_offload_with_hook(model, "cpu")
        assert torch.equal(hooked(*inputs).sample, expected)
        hook.remove()
        cpu_offload(model, torch.device("cpu"))
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            model(*inputs)


class TestQuantised:
    """By torchao, eight bits for weights."""

    def config(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    def quantise(self, model: nn.Module) -> int:
        from torchao.quantization import quantize_

        quantize_(model, self.config(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
        return sum(type(m.weight.data) is not Tensor for m in model.modules() if isinstance(m, nn.Linear))

    def test_text_encoders_and_the_converted_transformers_linears(self) -> None:
        pipeline = sd3_pipeline()
        lineate.convert(pipeline.transformer, "sd35-t5")
        images = [pipeline(**PROMPT, generator=torch.Generator().manual_seed(0), output_type="np").images]
        for part in (pipeline.text_encoder_3, pipeline.transformer):
            assert self.quantise(part)
            images.append(pipeline(**PROMPT, generator=torch.Generator().manual_seed(0), output_type="np").images)
        assert all(0 < abs(image - images[0]).max() < 0.05 for image in images[1:])
        assert len(core_modules(pipeline.transformer)) == 4

    def test_a_host_quantised_as_it_was_loaded_converts_and_runs_and_says_that_it_cannot_be_saved(self, tmp_path: Path) -> None:
        from diffusers import TorchAoConfig

        sd3(num_layers=1).save_pretrained(tmp_path / "host")
        model = SD3Transformer2DModel.from_pretrained(
            tmp_path / "host", quantization_config=TorchAoConfig(self.config()), torch_dtype=torch.float32
        )
        assert type(model.transformer_blocks[0].attn.to_q.weight.data) is not Tensor
        lineate.convert(model, "sd35-t5")
        with torch.no_grad():
            out = model(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.randn(1, 10), torch.tensor([500.0])).sample
        assert out.isfinite().all()
        with pytest.raises(UnsupportedModelError, match=r"cannot save_pretrained\(\): its host was quantised"):
            model.save_pretrained(tmp_path / "converted")
