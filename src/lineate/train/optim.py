"""Optimiser and schedule from timm's factories; parameter groups from the ConversionRecord.

    group       rate                    weight decay
    inherited   lr                      weights of two axes and more, except those that the model names (positions, tokens)
    new         lr · new_lr_multiplier  likewise

The multiplier is timm's `lr_scale`: it multiplies what the schedule gives, so it reaches warm-up and minimum rates as well.
"""

from __future__ import annotations

from typing import Any

import timm.optim
import timm.scheduler
import torch
from torch import nn

from lineate.train import TrainError
from lineate.train.config import TrainConfig
from lineate.train.protocols import new_names


def groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The parameters that learn, in at most four groups: new or inherited, with weight decay or without."""
    new = new_names(model)
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in spared
            found.setdefault((name in new, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": config.new_lr_multiplier if is_new else 1.0,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_new, decays), parameters in found.items()
    ]


def make_optimizer(model: nn.Module, config: TrainConfig, global_batch: int) -> torch.optim.Optimizer:
    """timm's optimiser `config.opt` over the groups. Raises `TrainError` for a name that timm does not know."""
    known = timm.optim.list_optimizers()
    if config.opt not in known:
        raise TrainError(f"opt: unknown optimiser {config.opt!r}; choices: {', '.join(known)}")
    extra = {"betas": config.betas} if timm.optim.get_optimizer_info(config.opt).has_betas else {}
    rate = config.lr * lr_factor(config, global_batch)
    made: torch.optim.Optimizer = timm.optim.create_optimizer_v2(groups(model, config), config.opt, lr=rate, **extra)
    return made


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, global_batch: int, per_epoch: int) -> Any:
    """The cosine with warm-up; `step_update(s)` sets the rates of step s."""
    factor = lr_factor(config, global_batch)
    return timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=total_steps(config, per_epoch),
        lr_min=config.min_lr * factor,
        warmup_t=config.warmup_epochs * per_epoch,
        warmup_lr_init=config.warmup_lr * factor,
        t_in_epochs=False,
    )


def lr_factor(config: TrainConfig, global_batch: int) -> float:
    """What all rates are multiplied by."""
    return global_batch / config.lr_base_size if config.lr_base_size else 1.0


def total_steps(config: TrainConfig, per_epoch: int) -> int:
    """Optimiser steps of the whole schedule, at least one."""
    return config.steps or max(1, round(config.epochs * per_epoch))
