"""Calls taken apart into examples and put together again: what belongs to every example stays whole."""

import pytest
import torch

from lineate.calls import Call, grouped, together

PLACES = torch.arange(15.0).view(5, 3)  # as Flux' img_ids: tokens along the first axis, one for all examples


def call(examples: int, places: torch.Tensor = PLACES) -> Call:
    return Call((torch.randn(examples, 4),), {"said": {"places": places, "step": torch.tensor(0.5)}, "flag": True})


def test_apart_and_together_is_the_call() -> None:
    whole = call(3)
    again = together(list(whole.each()))
    assert torch.equal(again.args[0], whole.args[0]) and again.kwargs["flag"] is True
    assert torch.equal(again.kwargs["said"]["places"], PLACES) and again.kwargs["said"]["step"].ndim == 0


def test_groups_hold_one_shape_and_lose_nobody() -> None:
    singles = [*call(3).each(), *call(2, torch.zeros(7, 3)).each()]
    assert sorted(len(one) for one in grouped(singles, 2)) == [1, 2, 2]


def test_what_all_share_must_be_the_same() -> None:
    with pytest.raises(ValueError, match=r"differ in a tensor \(5, 3\) that every example shares"):
        together([call(1), call(1, PLACES + 1)])
