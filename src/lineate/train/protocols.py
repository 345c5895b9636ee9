"""Which parameters learn: everything, the new ones only, or the new ones whole and the rest through LoRA; and what is kept of it.

What is new is read from the model's ConversionRecord; a model without one (a host being trained as a baseline) has nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn

from lineate.convert import ConversionRecord, core_modules, is_new
from lineate.families import detect, family
from lineate.train import TrainError
from lineate.train.config import Lora, Protocol, TrainConfig
from lineate.train.randomness import ADAPTER, derive, left_alone, seed_all


def new_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are new in `model`, by its record; under LoRA too."""
    done = getattr(model, "lineate_record", None)
    new = set(done.names("new")) if isinstance(done, ConversionRecord) else set()
    return {name for name, _ in model.named_parameters() if name.replace(".base_layer.", ".") in new}


def check(model: nn.Module, config: TrainConfig) -> None:
    """Raise `TrainError` for what this model cannot do, before the first long step."""
    if config.protocol == "lora":
        _targets(model, config.lora)
    if config.protocol == "freeze" and not new_names(model):
        raise TrainError(
            f"protocol 'freeze' trains the new parameters, and this {type(model).__name__} has none; choices: ft, lora"
        )
    if config.grad_checkpointing:
        _recompute(model)


def choose(model: nn.Module, config: TrainConfig) -> None:
    """Set `requires_grad` as the protocol says, put the LoRA layers in, and keep only the blocks' inputs where that is asked.

    Raises `TrainError` as `check` does.
    """
    check(model, config)
    if config.protocol == "lora":
        _inject(model, config.lora, config.seed)
    new = new_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.protocol == "ft" or name in new or ".lora_" in name)
    if config.grad_checkpointing:
        _recompute(model)()


def leave_unreached(model: nn.Module, reached: Collection[str]) -> list[str]:
    """Freeze what could learn and is not among the names that a gradient reached; the names of what was frozen."""
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in reached]
    for name in left:
        model.get_parameter(name).requires_grad_(False)
    return left


def train_mode(model: nn.Module, protocol: Protocol) -> None:
    """Training mode for what learns: with "freeze" the cores alone, so that the frozen host runs without dropout."""
    model.train(protocol != "freeze")
    if protocol == "freeze":
        for core in core_modules(model).values():
            core.train()


def _recompute(model: nn.Module) -> Callable[[], Any]:
    """What makes the model compute its blocks again in the backward pass, as its own library has it."""
    of_transformers = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ways: dict[str, dict[str, Any]] = {
        "set_grad_checkpointing": {}, "enable_gradient_checkpointing": {}, "gradient_checkpointing_enable": of_transformers,
    }  # fmt: skip
    for name, options in ways.items():
        if (way := getattr(model, name, None)) is not None:
            return partial(way, **options)
    raise TrainError(f"grad_checkpointing: a {type(model).__name__} cannot compute its blocks again; choices here: false")


def _targets(model: nn.Module, config: Lora) -> list[str]:
    """Names of the linear layers in the blocks that get an update; weights drawn anew learn whole."""
    done = getattr(model, "lineate_record", None)
    host = family(done.family) if isinstance(done, ConversionRecord) else detect(model)
    blocks, new = {part for block in host.blocks(model) for part in block.modules()}, new_names(model)
    inside = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in blocks and not is_new(name) and f"{name}.weight" not in new
    ]  # fmt: skip
    if config.targets is None:  # attention and MLP, whatever a host calls them: what modulates its norms stays
        return [name for name in inside if "norm" not in name and "adaLN" not in name]
    if unknown := [target for target in config.targets if not any(name.endswith(f".{target}") for name in inside)]:
        choices = sorted({name.rpartition(".")[2] for name in inside})
        raise TrainError(f"lora.targets: no linear layer is called {', '.join(unknown)}; choices: {', '.join(choices)}")
    return [name for name in inside if name.endswith(tuple(f".{target}" for target in config.targets))]


def _inject(model: nn.Module, config: Lora, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # late: it brings transformers along

    made = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=_targets(model, config))
    with left_alone():
        seed_all(derive(ADAPTER, seed))
        inject_adapter_in_model(made, model)


def merge(model: nn.Module) -> None:
    """Add the LoRA updates to the weights they belong to and take their layers out, so that the model has its own names again."""
    from peft.tuners.lora import LoraLayer

    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
