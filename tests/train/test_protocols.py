"""Who learns: Freeze touches nothing that was inherited; LoRA's updates merge into weights that give the same outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lineate
from lineate.convert import Conversion, is_new, record
from lineate.families import family
from lineate.train import TrainError
from lineate.train.config import Lora, TrainConfig
from lineate.train.protocols import check, choose, merge, new_names, train_mode

from ..tiny import dit, gradients, sd3

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


HOSTS = {
    "timm": lambda vit: vit(), "dit5": lambda vit: dit(), "sd35-t5-all": lambda vit: sd3(dual_attention_layers=(0,)),
}  # fmt: skip
CALLS = {
    "timm": lambda: (torch.rand(2, 3, 32, 32),),
    "dit5": lambda: (torch.rand(2, 3, 8, 6), torch.tensor([3, 40]), torch.tensor([1, 2])),
    "sd35-t5-all": lambda: (torch.rand(2, 4, 8, 8), torch.rand(2, 5, 12), torch.rand(2, 10), torch.tensor([3, 40])),
}


@pytest.mark.parametrize("name", HOSTS)
def test_lora_knows_the_layers_of_every_host(tiny_vit: Models, small: Small, name: str) -> None:
    """Attention and MLP of every block by their own names; what modulates norms, and what stands outside blocks, stays."""
    model = lineate.convert(HOSTS[name](tiny_vit), "t5" if name == "timm" else name)
    choose(model, small(protocol="lora"))
    updated = {part.rpartition(".lora_A")[0] for part, _ in model.named_parameters() if ".lora_A." in part}
    leaves = {part.split(".", 2)[2] for part in updated}
    if name == "sd35-t5-all":
        projections = {f"to_{x}" for x in ("q", "k", "v", "out.0")}
        joint = {f"attn.{part}" for part in (*projections, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
        mlps = {f"{mlp}.net.{part}" for mlp in ("ff", "ff_context") for part in ("0.proj", "2")}
        assert leaves == joint | {f"attn2.{part}" for part in projections} | mlps
    else:
        assert leaves == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize("name", HOSTS)
def test_recomputed_blocks_give_the_same_gradients(tiny_vit: Models, small: Small, name: str) -> None:
    """Every host is told so in its own library's words; each block then runs twice a step."""
    model, call = lineate.convert(HOSTS[name](tiny_vit), "t5" if name == "timm" else name), CALLS[name]()
    blocks, runs, found = family(record(model).family).blocks(model), [], []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for again in (False, True):
        choose(model, small(grad_checkpointing=again))
        train_mode(model, "ft")
        torch.manual_seed(0)
        output = model(*call)
        (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
        found.append((len(runs), gradients(model)))
    assert (found[0][0], found[1][0]) == (len(blocks), 3 * len(blocks))
    for part, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][part], gradient)


def test_what_a_model_cannot_do_is_known_before_anything_is_done(small: Small) -> None:
    class Plain(nn.Linear):
        """No host."""

    with pytest.raises(TrainError, match="a Plain cannot compute its blocks again; choices here: false"):
        check(Plain(2, 2), small(grad_checkpointing=True))


def test_lora_leaves_weights_that_were_drawn_anew_whole(converted: Models, small: Small) -> None:
    model = converted(Conversion(inherit="attention"))
    choose(model, small(protocol="lora", lora=Lora(targets=("qkv", "proj"))))
    assert model.get_parameter("blocks.0.mlp.fc1.weight").requires_grad
    with pytest.raises(TrainError, match="no linear layer is called fc1; choices: proj, qkv"):
        choose(converted(Conversion(inherit="attention")), small(protocol="lora", lora=Lora(targets=("qkv", "fc1"))))
