"""A model built from a released checkpoint computes what the checkpoint's own program computes, or is refused with the reason.

The reference below is written from the facts alone, one plain function over the released tensors; it shares no code with lineate.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lineate.checkpoint import load, save
from lineate.convert import record
from lineate.released import ReleasedError, from_released

DEPTH, HEADS, HEAD_DIM, HIDDEN, PATCH, SIDE, CLASSES = 2, 3, 8, 60, 4, 5, 7
WIDTH = HEADS * HEAD_DIM
Tensors = dict[str, Tensor]


def released(current: bool = True, qkv_bias: bool = True) -> Tensors:
    """Random tensors in the released format; the older one has neither w3 nor convolutions."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + around

    def linear(name: str, rows: int, columns: int) -> Tensors:
        return {f"{name}.weight": draw(rows, columns, scale=columns**-0.5), f"{name}.bias": draw(rows, scale=0.3)}

    def norm(name: str) -> Tensors:
        return {f"{name}.weight": draw(WIDTH, scale=0.2, around=1), f"{name}.bias": draw(WIDTH, scale=0.2)}

    tensors = {
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH, scale=0.2),
        "patch_embed.proj.bias": draw(WIDTH, scale=0.2),
        "pos_embed": draw(1, SIDE**2, WIDTH),
    }
    for i in range(DEPTH):
        block, attention = f"blocks.{i}", f"blocks.{i}.attn"
        tensors |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        tensors |= linear(f"{attention}.qkv", 3 * WIDTH, WIDTH) | linear(f"{attention}.proj", WIDTH, WIDTH)
        if not qkv_bias:
            del tensors[f"{attention}.qkv.bias"]
        for j in range(1, 4 if current else 3):
            tensors[f"{attention}.w{j}"] = draw(1, HEADS, HEAD_DIM, HEAD_DIM, scale=0.4)
        for name in ("q_conv2d", "k_conv2d") if current else ():
            tensors[f"{attention}.{name}.weight"] = draw(WIDTH, 1, 3, 3, scale=0.3)
            tensors[f"{attention}.{name}.bias"] = draw(WIDTH, scale=0.3)
        tensors |= linear(f"{block}.mlp.fc1", HIDDEN, WIDTH) | linear(f"{block}.mlp.fc2", WIDTH, HIDDEN)
    return tensors | norm("norm") | linear("head", CLASSES, WIDTH)


def inner_model(x: Tensor, weights: list[Tensor]) -> Tensor:
    if len(weights) == 3:
        return (F.silu(x @ weights[0]) * (x @ weights[1])) @ weights[2]
    return F.silu(x @ weights[0]) @ weights[1]


def attention(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    batch, tokens, _ = x.shape
    qkv = F.linear(x, tensors[f"{name}.qkv.weight"], tensors.get(f"{name}.qkv.bias"))
    q, k, v = qkv.view(batch, tokens, 3, WIDTH).unbind(2)  # (B, N, C), heads outermost in C
    k = (k - k.mean(1, keepdim=True)) / (k.var(1, correction=0, keepdim=True) + 1.0).sqrt()
    if f"{name}.q_conv2d.weight" in tensors:

        def convolve(y: Tensor, which: str) -> Tensor:
            grid = y.transpose(1, 2).reshape(batch, WIDTH, SIDE, SIDE)
            weight, bias = tensors[f"{name}.{which}.weight"], tensors[f"{name}.{which}.bias"]
            return y + F.conv2d(grid, weight, bias, padding=1, groups=WIDTH).flatten(2).transpose(1, 2)

        q, k = convolve(q, "q_conv2d"), convolve(k, "k_conv2d")
    q, k, v = (y.view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2) for y in (q, k, v))
    start = [
        tensors[f"{name}.w{j}"].expand(batch, -1, -1, -1).detach().requires_grad_()
        for j in (1, 2, 3)
        if f"{name}.w{j}" in tensors
    ]
    with torch.enable_grad():  # the inner step by autograd: each sample and head has its own loss, so their sum separates
        loss = -(HEAD_DIM**-0.5) / tokens * (v * inner_model(k, start)).sum()
        steps = torch.autograd.grad(loss, start)
    out = inner_model(q, [weight - step for weight, step in zip(start, steps, strict=True)])
    return F.linear(
        out.transpose(1, 2).reshape(batch, tokens, WIDTH), tensors[f"{name}.proj.weight"], tensors[f"{name}.proj.bias"]
    )


@torch.no_grad()
def reference(picture: Tensor, tensors: Tensors) -> Tensor:
    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = F.conv2d(picture, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + tensors["pos_embed"]
    for i in range(DEPTH):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), tensors, f"blocks.{i}.attn")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm").mean(1), "head")


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("current", [True, False])
def test_output_equals_the_reference(current: bool, qkv_bias: bool) -> None:
    tensors = released(current, qkv_bias)
    picture = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(2))
    model = from_released(tensors)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(picture), reference(picture, tensors), atol=1e-5, rtol=1e-5)
        assert model(torch.randn(1, 3, 3 * PATCH, 8 * PATCH)).shape == (1, CLASSES)


@pytest.mark.parametrize("absent", ["attn.w1", "attn.k_conv2d.weight", "attn.q_conv2d.bias", "attn.qkv.bias"])
def test_every_kind_of_core_tensor_matters_to_the_output(absent: str) -> None:
    """Otherwise the comparison with the reference would not notice a tensor that is read and left unused."""
    tensors, picture = released(), torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH)
    zeroed = tensors | {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith(absent)}
    with torch.no_grad():
        assert (from_released(tensors)(picture) - from_released(zeroed)(picture)).abs().max() > 1e-3


def test_geometry_is_read_off_the_tensors() -> None:
    model = from_released(released())
    assert (len(model.blocks), model.embed_dim, model.num_classes) == (DEPTH, WIDTH, CLASSES)
    assert model.patch_embed.img_size == (SIDE * PATCH, SIDE * PATCH) and model.blocks[0].mlp.fc1.out_features == HIDDEN
    assert model.blocks[0].attn.num_heads == HEADS


@pytest.mark.parametrize("current", [True, False])
def test_record_lists_every_tensor(current: bool) -> None:
    tensors = released(current)
    done = record(from_released(tensors))
    new = [name for name in tensors if ".attn.w" in name or "conv2d" in name]
    assert len(done.names("new")) == len(new) and all(".core." in name for name in done.names("new"))
    assert set(done.names("inherited")) == set(tensors) - set(new)
    assert sum(done.count(status) for status in ("new", "inherited")) == sum(tensor.numel() for tensor in tensors.values())


def test_what_is_built_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model, picture = from_released(released()), torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH)
    save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m")(picture), model(picture))


def as_safetensors(tensors: Tensors, file: Path) -> Path:
    save_file(tensors, file.with_suffix(".safetensors"))
    return file.with_suffix(".safetensors")


def as_pickle(tensors: Tensors, file: Path) -> Path:
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, file.with_suffix(".pt"))
    return file.with_suffix(".pt")


def as_training_checkpoint(tensors: Tensors, file: Path) -> Path:
    """The raw weights beside an EMA, an optimiser and the command line: the raw weights are those that the authors evaluate."""
    ema = {name: tensor + 1 for name, tensor in tensors.items()}
    state = {"model_ema": ema, "model": tensors, "optimizer": {"state": {}}, "epoch": 29, "args": argparse.Namespace(lr=1e-5)}
    torch.save(state, file.with_suffix(".pth"))
    return file.with_suffix(".pth")


def as_ema_only(tensors: Tensors, file: Path) -> Path:
    torch.save({"model_ema": {"state_dict": tensors}, "epoch": 29}, file.with_suffix(".pth"))
    return file.with_suffix(".pth")


@pytest.mark.parametrize("store", [as_safetensors, as_pickle, as_training_checkpoint, as_ema_only])
def test_files_and_wrappers_give_the_same_model(tmp_path: Path, store: Callable[[Tensors, Path], Path]) -> None:
    tensors = released()
    expected, found = from_released(tensors).state_dict(), from_released(store(tensors, tmp_path / "released")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(shape)}


FAULTS = {
    "missing": (without("blocks.1.mlp.fc2.bias"), "missing blocks.1.mlp.fc2.bias"),
    "missing, geometry": (without("pos_embed"), "missing pos_embed"),
    "unexpected": (with_("blocks.0.attn.rotary", 3), "unexpected blocks.0.attn.rotary"),
    "misshapen": (with_("blocks.1.attn.w2", 1, HEADS, HEAD_DIM, 9), r"blocks.1.attn.w2 has shape \(1, 3, 8, 9\) instead of"),
    "misshapen, unbatched": (
        with_("blocks.1.attn.w2", HEADS, HEAD_DIM, HEAD_DIM),
        r"has shape \(3, 8, 8\) instead of \(1, 3, 8, 8\)",
    ),
    "wrong axes": (
        with_("blocks.0.attn.w1", HEADS, HEAD_DIM, HEAD_DIM),
        r"blocks.0.attn.w1 has shape \(3, 8, 8\), expected 4 axes",
    ),
    "heads": (with_("blocks.0.attn.w1", 1, 4, HEAD_DIM, HEAD_DIM), "4 heads of 8 channels, but the model has 24"),
    "class token": (with_("pos_embed", 1, SIDE**2 + 1, WIDTH), "26 tokens, which is not a square grid"),
    "block gone": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.0.")},
        "missing blocks.0.attn.w1",
    ),
    "gap": (with_("blocks.4.norm1.weight", WIDTH), r"numbered from 0 without a gap: \[0, 1, 4\]"),
    "a convolution in the older format": (without("blocks.0.attn.w3"), "w3 is not there but the convolutions are"),
    "one block of the older format": (without("blocks.1.attn.w3"), "missing blocks.1.attn.w3"),
    "no tensor": (lambda tensors: tensors | {"note": "hello"}, "'note' is a str"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_silently_skipped(fault: str) -> None:
    spoil, reason = FAULTS[fault]
    with pytest.raises(ReleasedError, match=reason) as caught:
        from_released(spoil(released()))
    assert len(str(caught.value).splitlines()) == 1


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle ran code",))


def test_unreadable_files_are_one_clear_error(tmp_path: Path) -> None:
    torch.save({"model": released(), "trap": Trap()}, tmp_path / "trap.pth")
    torch.save({"model": released(), "day": datetime.date(2026, 1, 1)}, tmp_path / "day.pth")
    (tmp_path / "cut.pt").write_bytes(as_pickle(released(), tmp_path / "whole").read_bytes()[:-3000])
    (tmp_path / "cut.safetensors").write_bytes(as_safetensors(released(), tmp_path / "whole").read_bytes()[:-30])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a pickle")
    (tmp_path / "weights.h5").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    faults = {
        "trap.pth": "is refused",
        "day.pth": "datetime.date is refused",
        "cut.pt": "cannot be read",
        "cut.safetensors": "cannot be read",
        "empty.pth": "cannot be read",
        "text.pth": "no pickle of tensors",
        "weights.h5": "choices: .safetensors, .pt, .pth",
        "list.pt": "got list",
        "nowhere.pth": "is not there",
    }
    for name, reason in faults.items():
        with pytest.raises(ReleasedError, match=reason) as caught:
            from_released(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1, name
