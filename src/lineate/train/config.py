"""What a training run is: protocol, optimiser, schedule, augmentation, distillation, and how it runs.

    lr(s)  rises linearly from warmup_lr to lr, then falls along a cosine to min_lr at the last step
    where lr, warmup_lr and min_lr are all × (global batch / lr_base_size), and of new parameters all × new_lr_multiplier

Global batch = batch · accumulate · processes. `s` counts optimiser steps.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from lineate.mixers.base import Frozen

Protocol = Literal["ft", "freeze", "lora"]


class Augment(Frozen):
    """How labelled pictures are varied, by timm's transforms, mixup and cutmix; the default is a random resized crop and a flip.

    `crop` "pad" fits the picture to the model, centre cropped, puts 4 px of black around it and cuts the size out again, as is
    done with pictures of 32 px; pictures that are but moved so are kept in memory, where they are few and small. Of every
    picture chosen, `repeats` variants stand in a row (repeated augmentation: an epoch then shows 1/repeats of the pictures).
    `mixup` and `cutmix` are the alphas of their beta distributions; 0 turns off. `mix_prob` is how often a batch is mixed at
    all, `mix_switch` how often by cutmix where both are on.
    """

    crop: Literal["resized", "pad"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = Field(0.5, ge=0, le=1)
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    auto_augment: str | None = None
    jitter: float = Field(0.0, ge=0)
    erasing: float = Field(0.0, ge=0, le=1)
    repeats: int = Field(1, ge=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    mix_prob: float = Field(1.0, ge=0, le=1)
    mix_switch: float = Field(0.5, ge=0, le=1)
    smoothing: float = Field(0.0, ge=0, lt=1)

    @property
    def moves_only(self) -> bool:
        """Whether a picture is shifted and flipped and nothing else."""
        return self.crop == "pad" and not (self.auto_augment or self.jitter or self.erasing)

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0


class Distill(Frozen):
    """What is learned from the original beside the labels: weights of the terms; `labels` 0 needs no labels at all.

    `logits`: T²·KL(original ‖ model) of the classes at temperature T; `features`: 1 - cosine of the last block's patch tokens.
    """

    labels: float = Field(1.0, ge=0)
    logits: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    features: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Distill:
        if not (self.labels or self.logits or self.features):
            raise ValueError("labels, logits and features are all 0, so nothing would be learned")
        return self


class Lora(Frozen):
    """Low-rank updates of the linear layers in the blocks whose names end in one of `targets`; None: attentions and MLPs."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(None, min_length=1)


class Denoise(Frozen):
    """What a denoiser learns, see `train.diffusion`: noise along the chain of DDPM, or the velocity of a flow.

    `dropout` is the share of conditions that are dropped, for guidance; `vlb` weighs the bound that teaches DDPM's variance. With
    texts the objective is rectified flow (`train.rectified`), and `taught` the share of it that the original says.
    """

    objective: Literal["ddpm", "flow"] = "ddpm"
    dropout: float = Field(0.1, ge=0, lt=1)
    vlb: float = Field(1.0, ge=0)
    taught: float = Field(0.0, ge=0, le=1)


class TrainConfig(Frozen):
    """All that a run of `fit` is told. The default trains everything with AdamW and no augmentation but crop and flip.

    `protocol`: "ft" trains everything; "freeze" the new parameters only, the rest also without dropout; "lora" the new ones
    whole and the rest by low-rank updates that are merged at the end.
    `epochs` may be a fraction; `steps`, where given, are taken instead. `max_steps` stops earlier, on the schedule of the whole.
    `drop_path` is the last block's stochastic depth, rising linearly up to it, in a model of timm's that is made for this run;
    None is the model's own. `batch` is a process's share of one forward pass. `lr_base_size` None takes the rates as they are.
    `new_lr_multiplier` reaches the warm-up and minimum rates of the new parameters too (timm's lr_scale). `loss` and `distill`
    are for classifiers, `denoise` is for denoisers. `ema` is the decay of the averaged weights, which then are what is
    evaluated and what is left at the end; with `ema_warmup` it rises to that as timm's does, 1 - (1 + step)^(-2/3), else it is
    constant (DiT's). `checkpoint_steps` None is at every epoch's end; the last `keep` stay. `eval_epochs` 0 evaluates at the
    end only. `workers` has no influence on what is drawn. `precision` "tf32" is fp32 with TF32's products on GPUs; with
    `grad_checkpointing` a block keeps its input alone, and is computed again in the backward pass.
    """

    protocol: Protocol = "ft"
    epochs: float = Field(30.0, gt=0)
    steps: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch: int = Field(128, ge=1)
    accumulate: int = Field(1, ge=1)

    opt: str = "adamw"
    lr: float = Field(2e-5, gt=0)
    lr_base_size: int | None = Field(None, ge=1)
    min_lr: float = Field(0.0, ge=0)
    warmup_lr: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float | None = Field(None, gt=0)
    new_lr_multiplier: float = Field(1.0, gt=0)
    drop_path: float | None = Field(None, ge=0, lt=1)

    augment: Augment = Augment()
    loss: Literal["softmax", "bce"] = "softmax"
    distill: Distill = Distill()
    lora: Lora = Lora()
    denoise: Denoise = Denoise()
    ema: float | None = Field(None, gt=0, lt=1)
    ema_warmup: bool = True

    precision: Literal["no", "tf32", "bf16", "fp16"] = "no"
    grad_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    seed: int = Field(0, ge=0, lt=2**63)

    checkpoint_steps: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)
    eval_epochs: int = Field(1, ge=0)
    log_steps: int = Field(50, ge=1)
    tracker: str = "tensorboard"
    workers: int = Field(default_factory=lambda: min(4, os.cpu_count() or 1), ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be less than epochs {self.epochs:g}")
        if self.augment.mixes and self.batch % 2:
            raise ValueError(f"batch must be even for mixup and cutmix, which mix pairs; got {self.batch}")
        if self.compile and self.distill.features:
            raise ValueError("distill.features looks into the model, which compile closes; turn one of them off")
        return self
