"""DiT's weights under diffusers' names: the same values out, both ways; what no DiT could hold is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from lineate.models.dit import DiT
from lineate.models.dit_weights import WeightsError, dit_from, from_diffusers, geometry, to_diffusers

from ..tiny import dit

GEOMETRY = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def tiny(**changes: Any) -> DiT:
    return dit(**(GEOMETRY | changes))


def theirs() -> DiTTransformer2DModel:
    """diffusers' DiT in the same geometry, with the original's time frequencies and ε, one copy of the embedders."""
    model = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 977]), torch.tensor([4, 5])


def test_diffusers_weights_give_diffusers_values() -> None:
    model, (x, t, y) = theirs(), inputs()
    own = dit_from(model.state_dict(), num_heads=3, grid=(4, 4))
    with torch.no_grad():
        torch.testing.assert_close(own(x, t, y), model(x, t, y).sample, atol=1e-5, rtol=1e-5)


def test_our_weights_give_our_values_in_diffusers() -> None:
    own, model, (x, t, y) = tiny(), theirs(), inputs()
    model.load_state_dict(to_diffusers(own.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y).sample, own(x, t, y), atol=1e-4, rtol=1e-4)


def test_there_and_back_is_the_identity() -> None:
    state = tiny().state_dict()
    again = from_diffusers(to_diffusers(state), grid=(4, 4))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_geometry_is_read_off_the_shapes(learn_sigma: bool) -> None:
    changes = {"learn_sigma": learn_sigma, "mlp_ratio": 2.0}
    assert geometry(tiny(**changes).state_dict(), num_heads=3) == GEOMETRY | changes
    assert geometry(tiny(hidden_size=384, num_heads=6, depth=1).state_dict())["num_heads"] == 6


def test_embedders_that_differ_between_blocks_are_refused() -> None:
    tensors = to_diffusers(tiny().state_dict())
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name] = tensors[name] + 1
    with pytest.raises(WeightsError, match=rf"{name} differs from the first block's: a DiT has one t_embedder\.mlp\.2\.bias"):
        dit_from(tensors)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("pos_embed.proj.weight", "missing pos_embed.proj.weight"),
        ("transformer_blocks.1.attn1.to_k.bias", "missing blocks.1.attn.to_k.bias"),
        ("transformer_blocks.1.ff.net.2.bias", r'Missing key\(s\) in state_dict: "blocks.1.mlp.fc2.bias"'),
    ],
)
def test_a_missing_tensor_is_named(lost: str, message: str) -> None:
    tensors = to_diffusers(tiny().state_dict())
    del tensors[lost]
    with pytest.raises(WeightsError, match=message):
        dit_from(tensors, num_heads=3, grid=(4, 4))


def test_tensors_of_other_models_are_refused_by_name() -> None:
    with pytest.raises(WeightsError, match=r"transformer_blocks\.0\.attn2\.to_q\.weight is not a tensor of diffusers' DiT"):
        from_diffusers({"transformer_blocks.0.attn2.to_q.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.w1 is not a tensor of a DiT"):
        to_diffusers({"blocks.0.attn.w1": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"no shape tells the heads of a width of 24; pass num_heads="):
        dit_from(tiny().state_dict())
    with pytest.raises(WeightsError, match=r"not a DiT: hidden_size must be a multiple of 4 and of num_heads=5, got 24"):
        dit_from(tiny().state_dict(), num_heads=5)
    with pytest.raises(WeightsError, match="not a square grid"):
        dit_from(tiny(input_size=(8, 4)).state_dict(), num_heads=3)
