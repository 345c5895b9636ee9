"""The diffusion objectives against the papers' formulas, one scalar at a time, and what each term may teach."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lineate.models.dit import DiT
from lineate.train import TrainError
from lineate.train.data import Batch
from lineate.train.diffusion import Chain, Ddpm, ddpm, divergence, dropped, flow, pixel_log_likelihood

NULL = 5


class Denoiser(nn.Module):
    """A stand-in: (x, t, y) -> 2C channels (or `outputs`), and a note of what it was asked."""

    def __init__(self, channels: int = 3, outputs: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NULL + 1, channels)
        self.convolution = nn.Conv2d(channels, outputs or 2 * channels, 3, padding=1)
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.asked.append((x, t, y))
        out: Tensor = self.convolution(x + self.embedding(y)[:, :, None, None] + t[:, None, None, None] / 1000)
        return out


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(6, 3, 4, 4) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0]))


def betas() -> list[float]:
    return [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]


def test_the_noised_sample_is_the_chain_step_by_step() -> None:
    """x_t of the closed form has the mean and variance that T applications of q(x_t | x_{t-1}) give."""
    chain, mean, variance = Chain(Ddpm()), 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t, beta in enumerate(betas()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 1, 500, 999):
            at = torch.tensor([t])
            assert float(chain.noised(one, at, zero)) == pytest.approx(mean, rel=1e-5)
            assert float(chain.noised(zero, at, one)) ** 2 == pytest.approx(variance, rel=1e-5)


def test_the_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x): precisions add, and precision-weighted means."""
    chain, t = Chain(Ddpm()), 300
    before = math.prod(1 - beta for beta in betas()[:t])
    beta, x, x_t = betas()[t], 0.4, -0.7
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) / beta * x_t + math.sqrt(before) / (1 - before) * x) / precision
    at = torch.tensor([t])
    found = chain.mean(torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1, 1), x_t), at)
    assert float(found) == pytest.approx(mean, rel=1e-5)
    assert float(chain.at("low", at)) == pytest.approx(-math.log(precision), rel=1e-6)


def test_divergence_is_that_of_torchs_normals() -> None:
    mean, other = torch.randn(2, 50)
    log_variance, other_log_variance = torch.randn(2, 50)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log_variance / 2).exp()))
    torch.testing.assert_close(divergence(mean, log_variance, other, other_log_variance), expected)


def test_the_256_pixel_levels_share_all_probability() -> None:
    levels = torch.linspace(-1, 1, 256)
    for mean, log_variance in ((0.3, -6.0), (-0.98, -2.0), (0.999, -9.0)):
        found = pixel_log_likelihood(levels, torch.full((256,), mean), torch.full((256,), log_variance))
        assert float(found.exp().sum()) == pytest.approx(1, abs=1e-4)


def test_the_ddpm_loss_is_the_papers(batch: Batch) -> None:
    """Each sample by itself, from the formulas, with torch's own distributions."""
    model, x = Denoiser(), batch.images
    torch.manual_seed(3)
    terms = ddpm(NULL, Ddpm(steps=4, beta_end=0.3))(model, batch)
    torch.manual_seed(3)
    t, noise = torch.randint(4, (6,)), torch.randn(6, 3, 4, 4)
    assert set(t.tolist()) >= {0, 1, 2}
    beta = [1e-4 + (0.3 - 1e-4) * i / 3 for i in range(4)]
    bar = [math.prod(1 - b for b in beta[: i + 1]) for i in range(-1, 4)]  # bar[i] is ᾱ_{i-1}
    ((x_t, asked, labels),) = model.asked
    assert torch.equal(asked, t)
    output = model(x_t, t, labels)
    mse, bits = [], []
    for i, step in enumerate(t.tolist()):
        signal, previous = bar[step + 1], bar[step]
        torch.testing.assert_close(x_t[i], math.sqrt(signal) * x[i] + math.sqrt(1 - signal) * noise[i])
        found, v = output[i, :3], output[i, 3:]
        mse.append(((found - noise[i]) ** 2).mean())
        guess = (x_t[i] - math.sqrt(1 - signal) * found) / math.sqrt(signal)
        a, b = math.sqrt(previous) * beta[step] / (1 - signal), math.sqrt(1 - beta[step]) * (1 - previous) / (1 - signal)
        spread = [beta[s] * (1 - bar[s]) / (1 - bar[s + 1]) for s in range(4)][max(step, 1)]
        sigma = torch.exp(0.5 * ((v + 1) / 2 * math.log(beta[step]) + (1 - v) / 2 * math.log(spread)))
        ours = Normal(a * guess + b * x_t[i], sigma)
        if step:
            bits.append(kl_divergence(Normal(a * x[i] + b * x_t[i], math.sqrt(spread)), ours).mean() / math.log(2))
        else:
            inside = (ours.cdf(x[i] + 1 / 255) - ours.cdf(x[i] - 1 / 255)).clamp(min=1e-12)
            bits.append(-inside.log2().mean())
    torch.testing.assert_close(terms["mse"], torch.stack(mse).mean())
    torch.testing.assert_close(terms["vlb"], torch.stack(bits).mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vlb"])


def test_the_bound_teaches_the_variance_alone(batch: Batch) -> None:
    model = Denoiser()
    terms = ddpm(NULL, Ddpm(label_dropout=0))(model, batch)
    weight, bias = torch.autograd.grad(terms["vlb"], [model.convolution.weight, model.convolution.bias], retain_graph=True)
    assert bool((weight[:3] == 0).all()) and bool((bias[:3] == 0).all()) and bool((bias[3:] != 0).all())
    weight, bias = torch.autograd.grad(terms["mse"], [model.convolution.weight, model.convolution.bias])
    assert bool((weight[3:] == 0).all()) and bool((bias[3:] == 0).all()) and bool((bias[:3] != 0).all())


def test_the_variance_lies_between_its_two_bounds() -> None:
    chain, t = Chain(Ddpm()), torch.tensor([1, 400, 999])
    ends = [chain.log_variance(torch.full((3, 1, 1, 1), v), t) for v in (-1.0, 1.0)]
    torch.testing.assert_close(ends[1].flatten().exp().double(), torch.tensor([betas()[i] for i in t], dtype=torch.float64))
    assert bool((ends[0] < ends[1]).all())


def test_the_flow_loss_is_the_velocity_of_the_straight_line(batch: Batch) -> None:
    model, x = Denoiser(), batch.images
    torch.manual_seed(3)
    loss = flow(NULL)(model, batch)["loss"]
    torch.manual_seed(3)
    t, noise = torch.rand(6)[:, None, None, None], torch.randn_like(x)
    ((x_t, asked, labels),) = model.asked
    torch.testing.assert_close(x_t, t * x + (1 - t) * noise)
    assert torch.equal(asked, t.flatten())
    torch.testing.assert_close(loss, ((model(x_t, asked, labels)[:, :3] - (x - noise)) ** 2).mean())


def test_labels_are_dropped_to_the_null_class_as_often_as_asked() -> None:
    labels = torch.arange(20_000) % NULL
    found = dropped(labels, NULL, 0.1)
    gone = found == NULL
    assert torch.equal(found[~gone], labels[~gone])
    assert abs(float(gone.float().mean()) - 0.1) < 0.01
    assert torch.equal(dropped(labels, NULL, 0.0), labels)


def test_labels_are_dropped_once(batch: Batch) -> None:
    """In training a DiT drops its own; what it is asked then has all labels, and in eval mode, as when frozen, a share."""
    model = DiT(4, 2, 3, 8, 1, 2, class_dropout_prob=0.5, num_classes=NULL)
    asked: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: asked.append(args[2]))
    many = Batch(batch.images.repeat(50, 1, 1, 1), batch.labels.repeat(50))
    ddpm(NULL, Ddpm(label_dropout=0.5))(model, many)
    ddpm(NULL, Ddpm(label_dropout=0.5))(model.eval(), many)
    assert torch.equal(asked[0], many.labels)
    assert 0.3 < float((asked[1] == NULL).float().mean()) < 0.7


def test_a_model_without_variance_learns_the_noise_alone(batch: Batch) -> None:
    assert set(ddpm(NULL)(Denoiser(outputs=3), batch)) == {"loss"}
    with pytest.raises(TrainError, match="gives 5 channels for 3"):
        ddpm(NULL)(Denoiser(outputs=5), batch)


@pytest.mark.parametrize("make", [ddpm, flow])
def test_the_loop_trains_with_it(
    make: Callable[[int], object], train: Callable[..., object], small: Callable[..., object], tmp_path: Path
) -> None:
    model = Denoiser()
    before = model.convolution.weight.detach().clone()
    found = train(model, small(max_steps=2, ema=0.9), tmp_path, objective=make(NULL))
    assert found.steps == 2 and not torch.equal(before, model.convolution.weight)  # type: ignore[attr-defined]
