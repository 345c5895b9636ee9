"""DiT against the paper's equations, written out plainly; what its start guarantees; grids other than its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.models.dit import DIT_MODELS, DiT, grid_positions, time_frequencies

from ..tiny import DIT
from ..tiny import dit as tiny


def inputs(height: int = 8, width: int = 6, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, height, width), torch.tensor([3, 41])[:batch], torch.tensor([4, 5])[:batch]


def reference(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int, patch: int) -> Tensor:
    """The model as loops over tokens and patches, from its tensors by name."""

    def linear(name: str, a: Tensor) -> Tensor:
        return a @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(a: Tensor) -> Tensor:
        return (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    kernel = state["x_embedder.proj.weight"].flatten(1)
    patches = [
        x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten(1) @ kernel.T
        for r in range(rows)
        for c in range(columns)
    ]
    tokens = torch.stack(patches, 1) + state["x_embedder.proj.bias"] + state["pos_embed"]
    angle = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat((angle.cos(), angle.sin()), 1))))
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        shift, scale, gate, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", condition).chunk(6, -1)
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(tokens) * (1 + scale) + shift).chunk(3, -1)
        out = []
        for q_h, k_h, v_h in zip(*(a.chunk(heads, -1) for a in (q, k, v)), strict=True):
            out.append((q_h @ k_h.mT / math.sqrt(q_h.shape[-1])).softmax(-1) @ v_h)
        tokens = tokens + gate * linear(f"blocks.{i}.attn.proj", torch.cat(out, -1))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2), approximate="tanh")
        tokens = tokens + gate2 * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, -1)
    values = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    picture = torch.empty(x.shape[0], values.shape[-1] // patch**2, *x.shape[2:])
    for n in range(rows * columns):
        top, left = n // columns * patch, n % columns * patch
        patch_values = values[:, n].unflatten(-1, (patch, patch, -1)).permute(0, 3, 1, 2)
        picture[:, :, top : top + patch, left : left + patch] = patch_values
    return picture


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_equals_the_equations(learn_sigma: bool) -> None:
    model, (x, t, y) = tiny(learn_sigma=learn_sigma), inputs()
    with torch.no_grad():
        out = model(x, t, y)
        torch.testing.assert_close(out, reference(model.state_dict(), x, t, y, 3, 2), atol=1e-5, rtol=1e-5)
    assert out.shape == (2, 6 if learn_sigma else 3, 8, 6)


def test_it_starts_at_zero_with_every_block_the_identity() -> None:
    model, (x, t, y) = DiT(**DIT), inputs()
    assert not model(x, t, y).any()
    tokens = torch.randn(2, 12, 24)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 24)), tokens)


def test_positions_are_sines_of_columns_then_of_rows() -> None:
    positions = grid_positions(8, (2, 3), (2, 3))
    assert positions.shape == (1, 6, 8)
    for n in range(6):
        row, column = divmod(n, 3)
        expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
        torch.testing.assert_close(positions[0, n], torch.tensor(expected))


def test_a_finer_grid_has_the_own_grids_positions_at_the_same_places() -> None:
    own, fine = grid_positions(8, (3, 2), (3, 2)), grid_positions(8, (6, 4), (3, 2))
    assert torch.equal(fine.unflatten(1, (6, 4))[:, ::2, ::2].flatten(1, 2), own)


@pytest.mark.parametrize(("height", "width"), [(8, 6), (4, 12), (16, 10), (2, 2)])
def test_any_grid_is_answered_at_its_own_size(height: int, width: int) -> None:
    out = tiny()(*inputs(height, width))
    assert out.shape == (2, 6, height, width)
    assert out.isfinite().all()


def test_sizes_that_the_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="latents of 7x6 are not divisible by the patch of 2"):
        tiny()(*inputs(7, 6))
    with pytest.raises(ValueError, match="input_size 5x8 is not divisible by patch_size=2"):
        DiT(**DIT | {"input_size": (5, 8)})
    with pytest.raises(ValueError, match="multiple of 4 and of num_heads=5, got 24"):
        DiT(**DIT | {"num_heads": 5})


def test_labels_are_dropped_in_training_alone_and_for_the_null_label() -> None:
    model = tiny(class_dropout_prob=1.0)
    y = torch.tensor([0, 3])
    assert torch.equal(model.y_embedder(y), model.y_embedder.embedding_table.weight[y])
    model.train()
    assert torch.equal(model.y_embedder(y), model.y_embedder.embedding_table.weight[[5, 5]])
    assert tiny(class_dropout_prob=0).y_embedder.embedding_table.num_embeddings == 5


def test_times_need_not_be_whole() -> None:
    frequencies = time_frequencies(torch.tensor([0.25]))
    torch.testing.assert_close(frequencies[0, [0, 128]], torch.tensor([math.cos(0.25), math.sin(0.25)]))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, (x, t, y) = tiny(), inputs()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x, t, y).square().sum(), tuple(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_papers_models_have_the_papers_sizes() -> None:
    """Table 1 of arXiv 2212.09748: 33M, 130M, 458M, 675M parameters at patch 2."""
    assert len(DIT_MODELS) == 12
    for name, millions in {"DiT-S/2": 33, "DiT-B/2": 130, "DiT-L/2": 458, "DiT-XL/2": 675}.items():
        with torch.device("meta"):
            model = DiT(**DIT_MODELS[name])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)
