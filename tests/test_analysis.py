"""Key shift, implicit attention and PCA maps do what their equations say, on hosts and on converted models alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from lineate.analysis import implicit_attention, key_shift, pca_basis, pca_rgb
from lineate.convert import Conversion, convert
from lineate.core import Neighborhood
from lineate.evaluate import EvaluationError
from lineate.families import UnsupportedModelError
from lineate.mixers.linear import LinearConfig
from lineate.mixers.softmax import SoftmaxConfig

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
SITE, TOKENS = "blocks.1.attn", 17


def host(**overrides: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL | overrides).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def qkv(model: VisionTransformer, image: Tensor) -> tuple[Tensor, ...]:
    """q, k, v (1, H, N, D) of the second block, worked out from the first block's output."""
    seen: list[Tensor] = []
    handle = model.blocks[1].norm1.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(image.unsqueeze(0))
        attention = model.blocks[1].attn
        q, k, v = attention.qkv(seen[0]).reshape(1, TOKENS, 3, 2, 12).permute(2, 0, 3, 1, 4)
    handle.remove()
    return attention.q_norm(q).detach(), attention.k_norm(k).detach(), v


def shift_keys(model: VisionTransformer, by: float) -> None:
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[24:48] += by


def test_key_shift_is_equation_11_over_whole_keys_of_grid_tokens() -> None:
    model = host()
    ratios = []
    for image in pictures():
        k = qkv(model, image)[1][0, :, 1:].transpose(0, 1).flatten(1)
        ratios.append((k.mean(0).norm() / k.norm(dim=1).mean()).item())
    assert key_shift(model, pictures())[SITE] == pytest.approx(sum(ratios) / 2, rel=1e-5)


def test_a_shift_of_the_keys_takes_the_ratio_to_one() -> None:
    def ratios(by: float) -> Tensor:
        model = host()
        shift_keys(model, by)
        return torch.tensor(list(key_shift(model, pictures()).values()))

    near, far = ratios(10.0), ratios(1000.0)
    assert (ratios(0.0) < near).all()
    assert (near < far).all()
    assert torch.allclose(far, torch.ones(2), atol=1e-4)


def test_keys_that_are_all_alike_have_ratio_one_and_scale_does_not_matter() -> None:
    model = host()
    before = key_shift(model, pictures())
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[24:48] *= 7
        model.blocks[1].attn.qkv.bias[24:48] *= 7
    assert key_shift(model, pictures())[SITE] == pytest.approx(before[SITE], rel=1e-6)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[24:48] = 0
    assert key_shift(model, pictures())[SITE] == pytest.approx(1, abs=1e-6)


def test_a_core_is_read_before_its_key_norm_and_partial_conversions_show_every_site() -> None:
    model = host()
    before = key_shift(model, pictures())
    converted = convert(copy.deepcopy(model), Conversion(sites=("blocks.1.*",)))
    assert key_shift(converted, pictures()) == pytest.approx(before)


def test_a_pooled_key_shift_is_of_the_mean_over_all_images() -> None:
    model = host()
    keys = torch.cat([qkv(model, image)[1][0, :, 1:].transpose(0, 1).flatten(1) for image in pictures()])
    expected = (keys.mean(0).norm() / keys.norm(dim=1).mean()).item()
    assert key_shift(model, pictures(), pooled=True)[SITE] == pytest.approx(expected, rel=1e-5)
    assert key_shift(model, pictures(1), pooled=True) == pytest.approx(key_shift(model, pictures(1)))


def test_key_shift_reads_keys_after_the_hosts_own_norm() -> None:
    model = host(qk_norm=True)
    k = qkv(model, pictures(1)[0])[1][0, :, 1:].transpose(0, 1).flatten(1)
    expected = (k.mean(0).norm() / k.norm(dim=1).mean()).item()
    assert key_shift(model, pictures(1))[SITE] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arrange", [lambda m: m, lambda m: convert(m, "softmax")], ids=["host", "converted"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_softmaxs_implicit_map_is_its_attention_matrix(arrange: Callable[[VisionTransformer], nn.Module], qk_norm: bool) -> None:
    model, image = host(qk_norm=qk_norm), pictures(1)[0]
    q, k, _ = qkv(model, image)
    attention = (q @ k.mT * 12**-0.5).softmax(-1)[0]
    for query in (0, 6, TOKENS - 1):
        found = implicit_attention(arrange(copy.deepcopy(model)), image, SITE, query)
        assert found.shape == (2, TOKENS)
        assert (found - attention[:, query]).abs().max() < 1e-6


def test_linear_attentions_implicit_map_is_its_normalised_kernel() -> None:
    model, image = host(), pictures(1)[0]
    q, k, _ = qkv(model, image)
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    expected = (scores / scores.sum(-1, keepdim=True))[0, :, 5]
    linear = Conversion(mixer=LinearConfig(), key_norm="none", locality="none", sites=(SITE,))
    assert (implicit_attention(convert(model, linear), image, SITE, 5) - expected).abs().max() < 1e-6


def test_outside_its_window_a_neighborhood_branch_halves_the_softmax_score() -> None:
    model, image = host(), pictures(1)[0]
    whole = implicit_attention(model, image, SITE, 1)
    half = Conversion(mixer=SoftmaxConfig(), key_norm="none", locality="none", neighborhood=Neighborhood(window=3), sites=(SITE,))
    mixed = implicit_attention(convert(model, half), image, SITE, 1)
    inside = torch.zeros(TOKENS, dtype=torch.bool)
    inside[0] = True  # every window sees the class token
    inside[1:].view(4, 4)[:3, :3] = True  # query 1 is the grid's corner
    assert torch.allclose(mixed[:, ~inside], whole[:, ~inside] / 2, atol=1e-6)
    assert (mixed[:, inside] > whole[:, inside] / 2).all()


@pytest.mark.parametrize("preset", ["t5", "t5-plus", "t5-2layer"])
def test_the_map_of_any_core_is_the_norm_of_its_whole_jacobian(preset: str) -> None:
    model, image = convert(host(), preset).double(), pictures(1)[0]
    seen: list[tuple[Tensor, ...]] = []
    core = model.blocks[1].attn.core
    handle = core.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(image.double().unsqueeze(0))
    handle.remove()
    q, k, v, layout = seen[0]
    jacobian = torch.autograd.functional.jacobian(lambda values: core(q, k, values, layout)[0, :, 3], v)[:, :, 0]  # H D H N D
    expected = torch.stack([jacobian[h, :, h].square().sum((0, 2)).div(12).sqrt() for h in range(2)])
    assert torch.allclose(implicit_attention(model, image, SITE, 3), expected.float(), rtol=1e-5)
    assert jacobian[0, :, 1].count_nonzero() == 0


def test_looking_leaves_no_gradients_no_hooks_and_no_changed_modes() -> None:
    model = convert(host(), "t5").train()
    with torch.inference_mode():
        key_shift(model, pictures())
    implicit_attention(model, pictures(1)[0], SITE, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    attention = model.blocks[1].attn
    assert not attention.core._forward_pre_hooks
    assert not attention.k_norm._forward_hooks


def test_bad_input_is_named() -> None:
    model, image = host(), pictures(1)[0]
    with pytest.raises(EvaluationError, match=r"'blocks.7.attn'; sites: blocks.0.attn, blocks.1.attn"):
        implicit_attention(model, image, "blocks.7.attn", 0)
    with pytest.raises(EvaluationError, match="query 17 is not a token: the picture has tokens 0 to 16"):
        implicit_attention(model, image, SITE, TOKENS)
    with pytest.raises(EvaluationError, match="query -1"):
        implicit_attention(model, image, SITE, -1)
    with pytest.raises(EvaluationError, match="batch of 2"):
        implicit_attention(model, pictures(2), SITE, 0)
    with pytest.raises(EvaluationError, match="no images"):
        key_shift(model, [])
    with pytest.raises(UnsupportedModelError):
        key_shift(nn.Linear(2, 2), pictures())


def features(tokens: int = 20, channels: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, channels + 1)


def test_the_pca_basis_is_orthonormal_ordered_and_signed() -> None:
    mean, basis = pca_basis(features())
    assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12)
    variance = ((features().double() - mean) @ basis).var(0)
    assert (variance.diff() < 0).all()
    assert torch.allclose(pca_basis(-features())[1], basis)
    everything = torch.linalg.eigvalsh(features().double().T.cov()).flip(0)
    assert torch.allclose(variance, everything[:3])


def test_identical_features_give_identical_maps_of_the_grids_shape() -> None:
    a, b = pca_rgb(features(), features(), (4, 5))
    assert a.shape == (4, 5, 3)
    assert (a == b).all()
    assert (a.min((0, 1)) == 0).all()
    assert (a.max((0, 1)) == 1).all()


def test_basis_and_range_are_the_first_maps_alone() -> None:
    a, b = pca_rgb(features(), features(seed=1) * 50, (4, 5))
    assert (a == pca_rgb(features(), features(), (4, 5))[0]).all()
    assert 0 <= b.min() <= b.max() <= 1
    shrunk = pca_rgb(features(), features().mean(0) + 1e-3 * (features() - features().mean(0)), (4, 5))[1]
    assert shrunk.max((0, 1)) - shrunk.min((0, 1)) == pytest.approx(0, abs=2e-3)


def test_pca_refuses_shapes_that_cannot_be() -> None:
    with pytest.raises(EvaluationError, match=r"not .* for a 4×4 grid"):
        pca_rgb(features(), features(), (4, 4))
    with pytest.raises(EvaluationError, match="at least 3"):
        pca_rgb(features(channels=2), features(channels=2), (4, 5))
