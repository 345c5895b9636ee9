"""Rectified flow: the exact velocity has no loss, times go where the shift says, texts are dropped, a teacher may speak."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lineate.train.rectified import Pairs, rectified_flow

EMPTY = torch.full((3, 4), -1.0), torch.full((5,), -1.0)


class Model(nn.Module):
    """Knows the one picture that there is, so that it can tell its velocity; remembers what it was asked."""

    def __init__(self, picture: Tensor, off: float = 0.0) -> None:
        super().__init__()
        self.picture, self.off = picture, off
        self.asked: list[dict[str, Tensor]] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool, **text: Tensor) -> tuple[Tensor]:
        self.asked.append({"timestep": timestep, **text})
        return ((hidden_states - self.picture) / (timestep.view(-1, 1, 1, 1) / 1000) + self.off,)


def batch(size: int = 512) -> tuple[Pairs, Tensor]:
    picture = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return Pairs(picture.expand(size, -1, -1, -1), torch.ones(size, 3, 4), torch.ones(size, 5)), picture


def test_the_exact_velocity_has_no_loss() -> None:
    torch.manual_seed(0)
    pairs, picture = batch()
    assert float(rectified_flow(EMPTY)(Model(picture), pairs)["loss"]) < 1e-6
    torch.testing.assert_close(rectified_flow(EMPTY)(Model(picture, 0.5), pairs)["loss"], torch.tensor(0.25), atol=1e-3, rtol=0)


def test_times_are_logit_normal_and_shifted() -> None:
    pairs, picture = batch(4096)
    for shift in (1.0, 3.0):
        torch.manual_seed(0)
        model = Model(picture)
        rectified_flow(EMPTY, shift=shift)(model, pairs)
        sigma = model.asked[0]["timestep"] / 1000
        unshifted = sigma / (shift - (shift - 1) * sigma)
        normal = torch.logit(unshifted)
        assert abs(float(normal.mean())) < 0.1 and abs(float(normal.std()) - 1) < 0.1


def test_texts_are_dropped_whole_and_as_often_as_asked() -> None:
    torch.manual_seed(0)
    pairs, picture = batch(4096)
    model = Model(picture)
    rectified_flow(EMPTY, dropout=0.25)(model, pairs)
    text, pooled = model.asked[0]["encoder_hidden_states"], model.asked[0]["pooled_projections"]
    gone = pooled[:, 0] == -1
    assert torch.equal((text == -1).flatten(1).all(1), gone) and torch.equal((text == 1).flatten(1).all(1), ~gone)
    assert abs(float(gone.float().mean()) - 0.25) < 0.03


def test_a_teacher_says_its_share_of_the_target() -> None:
    torch.manual_seed(0)
    pairs, picture = batch()
    found = rectified_flow(EMPTY, teacher=Model(picture, 0.5), taught=1.0)(Model(picture, 0.5), pairs)
    assert float(found["loss"]) == float(found["teacher"]) == 0.0
    torch.testing.assert_close(found["flow"], torch.tensor(0.25), atol=1e-3, rtol=0)
    half = rectified_flow(EMPTY, teacher=Model(picture, 0.5), taught=0.5)(Model(picture, 0.5), pairs)
    torch.testing.assert_close(half["loss"], half["flow"] / 2)
