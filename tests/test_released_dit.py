"""DiT⁵ from the authors' format computes what the formulas say; DiT's and SiT's checkpoints are read however they were stored.

The reference below is written from the facts alone, one plain function over the released tensors; it shares no code with lineate.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from lineate.checkpoint import load, save
from lineate.cli.app import app
from lineate.convert import record
from lineate.generation.classes import Sampling, denoiser, sample
from lineate.models.dit import DiT
from lineate.models.dit_weights import to_diffusers
from lineate.released import ReleasedError, from_released, load_dit
from lineate.sources import load_denoiser
from lineate.text2image.autoencoder import GenerateError

DEPTH, HEADS, HEAD_DIM, HIDDEN, PATCH, SIDE, CHANNELS, CLASSES = 2, 3, 8, 60, 2, 6, 3, 5
WIDTH = HEADS * HEAD_DIM
Tensors = dict[str, Tensor]


def original(**changes: Any) -> DiT:
    """Random everywhere, also where it starts at zero."""
    torch.manual_seed(1)
    geometry = {"input_size": SIDE * PATCH, "patch_size": PATCH, "in_channels": CHANNELS, "hidden_size": WIDTH, "depth": DEPTH}
    model = DiT(**(geometry | {"num_heads": HEADS, "num_classes": CLASSES, "mlp_ratio": HIDDEN / WIDTH} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def released() -> Tensors:
    """Random tensors in the authors' DiT⁵ format: an original DiT's, and five kinds more an attention."""
    tensors = {name: tensor.clone() for name, tensor in original().state_dict().items()}
    for i in range(DEPTH):
        name = f"blocks.{i}.attn"
        tensors |= {f"{name}.w{j}": 0.4 * torch.randn(1, HEADS, HEAD_DIM, HEAD_DIM) for j in (1, 2)}
        for which in "qk":
            tensors[f"{name}.{which}_conv2d.weight"] = 0.3 * torch.randn(WIDTH, 1, 3, 3)
            tensors[f"{name}.{which}_conv2d.bias"] = 0.3 * torch.randn(WIDTH)
        tensors[f"{name}.qk_scale_ttt"] = 1 + 0.3 * torch.randn(1, 1, WIDTH, 2)
        tensors[f"{name}.qk_offset_ttt"] = 0.3 * torch.randn(1, 1, WIDTH, 2)
    return tensors


def near(q: Tensor, k: Tensor, v: Tensor, window: int = 5) -> Tensor:
    """Neighborhood attention on (B, H, N, D), query by query."""
    out = torch.empty_like(q)
    for n in range(SIDE * SIDE):
        top, left = (min(max(place - window // 2, 0), SIDE - window) for place in divmod(n, SIDE))
        seen = [r * SIDE + c for r in range(top, top + window) for c in range(left, left + window)]
        scores = q[:, :, n : n + 1] @ k[:, :, seen].mT / math.sqrt(HEAD_DIM)
        out[:, :, n] = (scores.softmax(-1) @ v[:, :, seen])[:, :, 0]
    return out


def attention(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    batch, tokens, _ = x.shape
    q, k, v = F.linear(x, tensors[f"{name}.qkv.weight"], tensors[f"{name}.qkv.bias"]).chunk(3, -1)  # heads outermost in C

    def heads(y: Tensor) -> Tensor:
        return y.view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2)

    def convolve(y: Tensor, which: str) -> Tensor:
        grid = y.transpose(1, 2).reshape(batch, WIDTH, SIDE, SIDE)
        weight, bias = tensors[f"{name}.{which}.weight"], tensors[f"{name}.{which}.bias"]
        return y + F.conv2d(grid, weight, bias, padding=1, groups=WIDTH).flatten(2).transpose(1, 2)

    local = near(heads(q), heads(k), heads(v))
    scale, offset = tensors[f"{name}.qk_scale_ttt"], tensors[f"{name}.qk_offset_ttt"]
    q, k = q * scale[..., 0] + offset[..., 0], k * scale[..., 1] + offset[..., 1]
    k = (k - k.mean(1, keepdim=True)) / (k.var(1, correction=0, keepdim=True) + 1.0).sqrt()
    q, k, v = heads(convolve(q, "q_conv2d")), heads(convolve(k, "k_conv2d")), heads(v)
    start = [tensors[f"{name}.w{j}"].expand(batch, -1, -1, -1).detach().requires_grad_() for j in (1, 2)]
    with torch.enable_grad():  # the inner step by autograd: each sample and head has its own loss, so their sum separates
        loss = HEAD_DIM**-0.5 / tokens / 2 * (F.silu(k @ start[0]) @ start[1] - v).square().sum()
        steps = torch.autograd.grad(loss, start)
    w1, w2 = (weight - step for weight, step in zip(start, steps, strict=True))
    out = 0.5 * F.silu(q @ w1) @ w2 + 0.5 * local
    return F.linear(
        out.transpose(1, 2).reshape(batch, tokens, WIDTH), tensors[f"{name}.proj.weight"], tensors[f"{name}.proj.bias"]
    )


def softmax(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    """The original's attention."""
    q, k, v = (
        part.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)
        for part in F.linear(x, tensors[f"{name}.qkv.weight"], tensors[f"{name}.qkv.bias"]).chunk(3, -1)
    )
    out = ((q @ k.mT / math.sqrt(HEAD_DIM)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(out, tensors[f"{name}.proj.weight"], tensors[f"{name}.proj.bias"])


@torch.no_grad()
def reference(x: Tensor, t: Tensor, y: Tensor, tensors: Tensors, attention: Any = attention) -> Tensor:
    def norm(a: Tensor) -> Tensor:
        return F.layer_norm(a, (WIDTH,), eps=1e-6)

    def linear(a: Tensor, name: str) -> Tensor:
        return F.linear(a, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    tokens = F.conv2d(x, tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"], stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2) + tensors["pos_embed"]
    angle = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    time = linear(F.silu(linear(torch.cat((angle.cos(), angle.sin()), 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = F.silu(time + tensors["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(DEPTH):
        b1, s1, g1, b2, s2, g2 = linear(condition, f"blocks.{i}.adaLN_modulation.1").chunk(6, -1)
        tokens = tokens + g1 * attention(norm(tokens) * (1 + s1) + b1, tensors, f"blocks.{i}.attn")
        hidden = F.gelu(linear(norm(tokens) * (1 + s2) + b2, f"blocks.{i}.mlp.fc1"), approximate="tanh")
        tokens = tokens + g2 * linear(hidden, f"blocks.{i}.mlp.fc2")
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").chunk(2, -1)
    values = linear(norm(tokens) * (1 + scale) + shift, "final_layer.linear")
    grid = values.view(-1, SIDE, SIDE, PATCH, PATCH, 2 * CHANNELS)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * CHANNELS, SIDE * PATCH, SIDE * PATCH)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = SIDE * PATCH
    return torch.randn(2, CHANNELS, side, side, generator=generator), torch.tensor([3, 41]), torch.tensor([4, 5])


def test_dit5_equals_the_reference() -> None:
    tensors = released()
    model = from_released(tensors)
    assert not model.training
    assert record(model).conversion.qk_affine
    with torch.no_grad():
        out = model(*inputs())
        torch.testing.assert_close(out, reference(*inputs(), tensors), atol=1e-5, rtol=1e-5)
        swapped = tensors | {name: tensor.flip(-1) for name, tensor in tensors.items() if "qk_scale_ttt" in name}
        assert not torch.allclose(out, reference(*inputs(), swapped), atol=1e-3)  # the test sees which entry is q's
        assert model(torch.randn(1, CHANNELS, 8, 16), torch.tensor([7]), torch.tensor([0])).shape == (1, 2 * CHANNELS, 8, 16)


def test_dit5_from_a_training_run_takes_the_ema_and_saves_as_any_other(tmp_path: Path) -> None:
    tensors = released()
    run = {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, "ema": tensors, "opt": {"state": {}}}
    torch.save(run | {"args": argparse.Namespace(model="DiT-S/2")}, tmp_path / "0050000.pt")
    model = from_released(tmp_path / "0050000.pt")
    assert torch.equal(model(*inputs()), from_released(tensors)(*inputs()))
    save(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(*inputs()), model(*inputs()))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("blocks.1.attn.qk_scale_ttt", "not a DiT⁵ checkpoint: missing blocks.1.attn.qk_scale_ttt"),
        ("blocks.0.attn.w1", "an unconverted DiT is read by load_dit"),
        ("pos_embed", "not a DiT⁵ checkpoint: not a DiT: missing pos_embed"),
    ],
)
def test_dit5_with_a_tensor_missing_is_refused_by_its_name(lost: str, message: str) -> None:
    tensors = released()
    del tensors[lost]
    with pytest.raises(ReleasedError, match=message):
        from_released(tensors)


def test_dit5_with_a_tensor_too_many_or_misshapen_is_refused_by_its_name() -> None:
    scale = {"blocks.0.attn.qk_scale_ttt": torch.ones(1, 1, 2, WIDTH)}
    with pytest.raises(ReleasedError, match=r"qk_scale_ttt has shape \(1, 1, 2, 24\) instead of \(1, 1, 24, 2\)"):
        from_released(released() | scale)
    with pytest.raises(ReleasedError, match=r"unexpected blocks\.0\.attn\.w3"):
        from_released(released() | {"blocks.0.attn.w3": torch.zeros(1, HEADS, HEAD_DIM, HEAD_DIM)})


# The original DiT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["raw", "safetensors", "training", "wrapped"])
def test_an_original_checkpoint_is_read_whichever_way_it_was_stored(stored: str, tmp_path: Path) -> None:
    model = original()
    state, file = model.state_dict(), tmp_path / "DiT-XL-2-256x256.pt"
    if stored == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(state, file)
    elif stored == "training":
        raw = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
        torch.save({"model": raw, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, file)
    else:
        torch.save(state if stored == "raw" else {"model": {f"module.{n}": tensor for n, tensor in state.items()}}, file)
    again = load_dit(file, num_heads=HEADS)
    assert not again.training
    assert torch.equal(again(*inputs()), model(*inputs()))


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_folder_of_diffusers_is_read_with_its_own_heads_and_grid(pipeline: bool, tmp_path: Path) -> None:
    model, folder = original(), tmp_path / "transformer" if pipeline else tmp_path
    folder.mkdir(exist_ok=True)
    config = {"num_attention_heads": HEADS, "sample_size": SIDE * PATCH, "patch_size": PATCH}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = to_diffusers(model.state_dict())
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "diffusion_pytorch_model.safetensors")
    assert torch.equal(load_dit(tmp_path)(*inputs()), model(*inputs()))


def test_a_folder_with_a_pickle_is_read_safely(tmp_path: Path) -> None:
    """As facebook/DiT-XL-2-256 has it, whose weights are a .bin; safetensors go before it, and code is not run."""
    model, config = original(), {"num_attention_heads": HEADS, "sample_size": SIDE * PATCH, "patch_size": PATCH}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(to_diffusers(model.state_dict()), file)
    assert torch.equal(load_dit(tmp_path)(*inputs()), model(*inputs()))
    torch.save({"x": Path("code")}, file)
    with pytest.raises(ReleasedError, match=r"model\.bin holds more than weights \(pathlib.* is refused\)"):
        load_dit(tmp_path)
    file.unlink()
    with pytest.raises(
        ReleasedError, match=r"holds no weights; one of diffusion_pytorch_model\.safetensors, .*\.bin was expected"
    ):
        load_dit(tmp_path)


SIT = (
    "pos_embed x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 y_embedder.embedding_table blocks.0.attn.qkv blocks.0.attn.proj "
    "blocks.0.mlp.fc1 blocks.0.mlp.fc2 blocks.0.adaLN_modulation.1 blocks.1.attn.qkv blocks.1.attn.proj blocks.1.mlp.fc1 "
    "blocks.1.mlp.fc2 blocks.1.adaLN_modulation.1 final_layer.linear final_layer.adaLN_modulation.1"
)


def test_sits_checkpoint_is_sampled_by_euler_and_stays_a_flow(tmp_path: Path) -> None:
    """SiT: the same names; a velocity at times from 0, noise, to 1, data, of whose six channels three count."""
    tensors = dict(original().state_dict())
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in tensors} == set(SIT.split())
    torch.save({"model": {n: torch.zeros_like(x) for n, x in tensors.items()}, "ema": tensors}, tmp_path / "SiT.pt")
    source = f"dit:hidden_size={WIDTH},num_heads={HEADS}@{tmp_path / 'SiT.pt'}"
    x = torch.randn(1, CHANNELS, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(5))
    for step in range(4):
        velocity, none = (reference(x, torch.tensor([step / 4]), torch.tensor([y]), tensors, softmax) for y in (2, CLASSES))
        x = x + (none + 1.5 * (velocity - none))[:, :CHANNELS] / 4
    flow = Sampling(scheduler="flow", steps=4, guidance=1.5)
    torch.testing.assert_close(sample(denoiser(load_denoiser(source)), [2], [5], flow), x, atol=1e-4, rtol=1e-4)

    quick = ["--steps", "4", "--set", "calibration.steps=1", "--set", "calibration.pool=2", "--set", "calibration.batch=1"]
    done = CliRunner().invoke(app, ["calibrate", source, "--scheduler", "flow", *quick, "--out", str(tmp_path / "sit5")])
    assert done.exit_code == 0, done.output
    made = denoiser(load(tmp_path / "sit5"))
    assert made.objective == "flow" and sample(made, [2], [5], flow).isfinite().all()
    with pytest.raises(GenerateError, match="learned flow, not what ddpm asks"):
        sample(made, [2], [5], Sampling(steps=4))


def test_what_is_no_dit_is_refused_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    torch.save({"head.weight": torch.zeros(1)}, file)
    with pytest.raises(ReleasedError, match=r"other\.pt: not a DiT: missing x_embedder\.proj\.weight"):
        load_dit(file)
    with pytest.raises(ReleasedError, match="is not a folder of diffusers' DiTTransformer2DModel"):
        load_dit(tmp_path)
