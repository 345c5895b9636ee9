"""Parameter groups and rates: every learning parameter once, and the multiplier of new ones at every point of the schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lineate.convert import is_new
from lineate.train import TrainError
from lineate.train.config import TrainConfig
from lineate.train.optim import groups, make_optimizer, make_schedule, total_steps
from lineate.train.protocols import choose

Models = Callable[..., nn.Module]
Small = Callable[..., TrainConfig]


@pytest.mark.parametrize("protocol", ["ft", "freeze", "lora"])
def test_every_learning_parameter_is_in_one_group(converted: Models, small: Small, protocol: str) -> None:
    model, config = converted(), small(protocol=protocol)
    choose(model, config)
    made = groups(model, config)
    listed = [id(parameter) for group in made for parameter in group["params"]]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(listed) == sorted(id(parameter) for parameter in learning)


def test_new_parameters_have_the_multiplier_and_vectors_no_decay(converted: Models, small: Small) -> None:
    model, config = converted(), small(new_lr_multiplier=20, weight_decay=0.1)
    found = {id(p): group for group in groups(model, config) for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr_scale"] == (20 if is_new(name) else 1)
        spared = parameter.ndim < 2 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
        assert group["weight_decay"] == (0 if spared else 0.1)


def test_weights_drawn_anew_count_as_new(converted: Models, small: Small) -> None:
    from lineate.convert import Conversion

    model, config = converted(Conversion(inherit="attention")), small(new_lr_multiplier=20)
    found = {id(p): group for group in groups(model, config) for p in group["params"]}
    assert found[id(model.get_parameter("blocks.0.mlp.fc1.weight"))]["lr_scale"] == 20
    assert found[id(model.get_parameter("blocks.0.attn.qkv.weight"))]["lr_scale"] == 1


def rates(model: nn.Module, config: TrainConfig, step: int) -> tuple[float, float]:
    """(inherited, new) at a step, of 10 steps an epoch of 1024 images each."""
    optimizer = make_optimizer(model, config, global_batch=1024)
    make_schedule(optimizer, config, 1024, 10).step_update(step)
    by_scale = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    return by_scale[1.0], by_scale[20.0]


def test_the_multiplier_and_the_batch_reach_warm_up_peak_and_minimum(converted: Models, small: Small) -> None:
    config = small(epochs=10, lr=2e-5, lr_base_size=512, min_lr=2e-7, warmup_lr=2e-8, warmup_epochs=2, new_lr_multiplier=20.0)
    for step, rate in ((0, 2e-8), (20, None), (99, None), (100, 2e-7)):
        inherited, new = rates(converted(), config, step)
        assert new == pytest.approx(20 * inherited)
        if rate is not None:
            assert inherited == pytest.approx(2 * rate)
    assert rates(converted(), config, 10)[0] == pytest.approx(2 * (2e-5 + 2e-8) / 2)
    unscaled = config.model_copy(update={"lr_base_size": None})
    assert rates(converted(), unscaled, 0)[0] == pytest.approx(2e-8)


def test_max_steps_leaves_the_schedule_as_it_is(small: Small) -> None:
    assert total_steps(small(epochs=1.5, max_steps=3), 10) == 15


def test_an_unknown_optimiser_is_refused(converted: Models, small: Small) -> None:
    with pytest.raises(TrainError, match=r"unknown optimiser 'adamm'; choices: .*adamw"):
        make_optimizer(converted(), small(opt="adamm"), 8)


def test_an_optimiser_without_betas_gets_none(converted: Models, small: Small) -> None:
    assert isinstance(make_optimizer(converted(), small(opt="momentum"), 8), torch.optim.SGD)
