"""Which parameters learn: everything, the new ones only, or the new ones whole and the rest through LoRA.

What is new is read from the model's ConversionRecord; a model without one (a host being trained as a baseline) has nothing new.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lineate.convert import ConversionRecord, core_modules, is_new
from lineate.train import TrainError
from lineate.train.config import Lora, Protocol, TrainConfig
from lineate.train.randomness import ADAPTER, derive, left_alone, seed_all


def new_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are new in `model`, by its record; under LoRA too."""
    done = getattr(model, "lineate_record", None)
    new = set(done.names("new")) if isinstance(done, ConversionRecord) else set()
    return {name for name, _ in model.named_parameters() if name.replace(".base_layer.", ".") in new}


def choose(model: nn.Module, config: TrainConfig) -> None:
    """Set `requires_grad` as the protocol says, and put the LoRA layers in. Raises `TrainError` if nothing would learn."""
    new = new_names(model)
    if config.protocol == "lora":
        _inject(model, config.lora, new, config.seed)
        new = new_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.protocol == "ft" or name in new or ".lora_" in name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainError(
            f"protocol {config.protocol!r} trains the new parameters, and this {type(model).__name__} has none; choices: ft, lora"
        )


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


def _inject(model: nn.Module, config: Lora, new: set[str], seed: int) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_new(name)]
    inside = [name for name in linears if "." in name and f"{name}.weight" not in new]
    targets = [name for name in inside if name.rpartition(".")[2] in config.targets]
    if unknown := [target for target in config.targets if not any(name.endswith(f".{target}") for name in targets)]:
        choices = sorted({name.rpartition(".")[2] for name in inside})
        raise TrainError(f"lora.targets: no linear layer is called {', '.join(unknown)}; choices: {', '.join(choices)}")
    from peft import LoraConfig, inject_adapter_in_model  # late: it brings transformers along

    made = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    with left_alone():
        seed_all(derive(ADAPTER, seed))
        inject_adapter_in_model(made, model)


def merge(model: nn.Module) -> None:
    """Add the LoRA updates to the weights they belong to and take their layers out, so that the model has its own names again."""
    from peft.tuners.lora import LoraLayer

    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
