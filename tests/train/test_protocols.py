"""Who learns: Freeze touches nothing that was inherited; LoRA's updates merge into weights that give the same outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lineate.convert import Conversion, is_new
from lineate.train import TrainError
from lineate.train.config import Lora, TrainConfig
from lineate.train.protocols import choose, merge, new_names, train_mode

Models = Callable[..., nn.Module]
Small = Callable[..., TrainConfig]


def test_freeze_trains_what_is_new_and_runs_the_rest_without_dropout(converted: Models, small: Small) -> None:
    model = converted(proj_drop_rate=0.5)
    choose(model, small(protocol="freeze"))
    train_mode(model, "freeze")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == new_names(model) != set()
    training = {name for name, module in model.named_modules() if module.training}
    assert training and all(is_new(f"{name}.") for name in training)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    train_mode(model, "ft")
    assert all(module.training for module in model.modules())


def test_freeze_needs_something_new(converted: Models, small: Small) -> None:
    with pytest.raises(TrainError, match="'freeze' trains the new parameters, and this VisionTransformer has none"):
        choose(converted("softmax"), small(protocol="freeze"))


def test_full_training_works_without_a_conversion(tiny_vit: Models, small: Small) -> None:
    model = tiny_vit()
    choose(model, small())
    assert new_names(model) == set() and all(parameter.requires_grad for parameter in model.parameters())


def test_lora_begins_at_the_model_and_merges_into_its_own_names(converted: Models, small: Small) -> None:
    model, images = converted(), torch.rand(2, 3, 32, 32)
    names, before = list(model.state_dict()), model(images)
    choose(model, small(protocol="lora"))
    assert torch.equal(model(images), before)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert new_names(model) < learning
    assert all(".lora_" in name or is_new(name) for name in learning)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    adapted = model(images)
    merge(model)
    assert list(model.state_dict()) == names
    assert not torch.allclose(adapted, before, atol=1e-3)
    torch.testing.assert_close(model(images), adapted)


def test_lora_is_drawn_from_the_seed_and_leaves_the_generator(converted: Models, small: Small) -> None:
    states = []
    for _ in range(2):
        model = converted()
        torch.manual_seed(torch.seed())
        before = torch.get_rng_state()
        choose(model, small(protocol="lora", seed=3))
        assert torch.equal(before, torch.get_rng_state())
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_lora_leaves_weights_that_were_drawn_anew_whole(converted: Models, small: Small) -> None:
    model = converted(Conversion(inherit="attention"))
    choose(model, small(protocol="lora", lora=Lora(targets=("qkv", "proj"))))
    assert model.get_parameter("blocks.0.mlp.fc1.weight").requires_grad
    with pytest.raises(TrainError, match="no linear layer is called fc1; choices: proj, qkv"):
        choose(converted(Conversion(inherit="attention")), small(protocol="lora", lora=Lora(targets=("qkv", "fc1"))))
