"""Whole training configurations by name. Each docstring gives its command, the time it takes, and the score to expect.

`lineate train SOURCE --data D --out RUN --recipe NAME`; any field changes with `--set train.FIELD=VALUE`. Rates are for steps of
so many images as `lr_base_size` says and change in proportion, so a step may have any size. IMAGENET stands for the folder with
train/ and val/.

For denoisers VAE stands for the folder of a diffusers AutoencoderKL.

Source: Li et al., arXiv 2605.02772, Tables 8 and 9 and its released code; Touvron et al., arXiv 2012.12877, and Peebles & Xie,
arXiv 2212.09748, for DeiT's and DiT's own.
"""

from __future__ import annotations

from collections.abc import Callable

from lineate.train.config import Augment, TrainConfig

DEIT_AUGMENT = Augment(
    auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25, repeats=3, mixup=0.8, cutmix=1.0, smoothing=0.1,
)  # fmt: skip


def t5() -> TrainConfig:
    """The paper's fine-tuning of all weights (Table 8), from a softmax model that was trained with the same layout.

        accelerate launch -m lineate train SOURCE --data IMAGENET --out RUN --preset t5-paper --recipe t5 --device cuda

    Time: not measured. Expected by the paper, top-1 on ImageNet: 71.19 (T⁵-T), 79.00 (T⁵-S), 72.06 (T⁵⁺-T), 79.64 (T⁵⁺-S).
    Weight decay is the paper's 1e-8; its released code has 0.05. Drop path must be 0 in the model. DeiT's erasing, repeated
    augmentation, mixup and cutmix stay on.
    """
    return TrainConfig(
        protocol="ft", epochs=30, batch=128, lr=2e-5, lr_base_size=512, min_lr=2e-7, warmup_lr=2e-8, warmup_epochs=5,
        weight_decay=1e-8, new_lr_multiplier=20, augment=DEIT_AUGMENT,
    )  # fmt: skip


def t5_freeze() -> TrainConfig:
    """The paper's Freeze protocol: `t5`, but only the new parameters learn.

        accelerate launch -m lineate train SOURCE --data IMAGENET --out RUN --preset t5-paper --recipe t5-freeze --device cuda

    Time: not measured. Expected by the paper without convolutions (Table 1): 67.33 (TTT-SwiGLU, DeiT-T).
    """
    return t5().model_copy(update={"protocol": "freeze"})


def t5_lora() -> TrainConfig:
    """Between the two: `t5` with the new parameters whole and the host's linear layers by LoRA; not in the paper.

        accelerate launch -m lineate train SOURCE --data IMAGENET --out RUN --recipe t5-lora --device cuda

    Time: not measured. Expected: not known. LoRA's own rate is ten times the inherited weights'.
    """
    return t5().model_copy(update={"protocol": "lora", "lr": 2e-4, "min_lr": 2e-6, "warmup_lr": 2e-7, "new_lr_multiplier": 2.0})


def deit() -> TrainConfig:
    """DeiT from scratch, the softmax baseline that conversions inherit from, with its drop path of 0.1.

    DeiT itself is trained with 1024 images a step, where these are its rates.

        accelerate launch -m lineate train timm:deit_tiny_patch16_224 --scratch --set class_token=drop --data IMAGENET --out RUN \
            --preset softmax --recipe deit --device cuda

    Time: not measured. Expected by the paper, with global average pooling: 72.05 (DeiT-T), 80.24 (DeiT-S).
    """
    return TrainConfig(
        protocol="ft", epochs=300, batch=128, lr=1e-3, lr_base_size=1024, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5,
        weight_decay=0.05, drop_path=0.1, augment=DEIT_AUGMENT,
    )  # fmt: skip


def dit5() -> TrainConfig:
    """The paper's fine-tuning of DiT-XL/2 at 256 px with every attention replaced: 128 images a step, on 8 GPUs 16 each.

        accelerate launch -m lineate train dit:DiT-XL/2@DiT-XL-2-256x256.pt --data IMAGENET --vae VAE --out RUN \
            --preset dit5 --recipe dit5 --device cuda

    Time: not measured. Expected by the paper after these 80,000 steps, 0.57 % of DiT's own: FID-50K 2.48, IS 267.9 (Table 6).
    DiT's rate, constant, in TF32 as its code; every new parameter at twice that, where the released code has it for W1 and W2
    alone. SiT's checkpoints learn a velocity: `--set train.denoise.objective=flow`.
    """
    return dit().model_copy(update={"epochs": 8.0, "batch": 16, "new_lr_multiplier": 2.0})


def dit() -> TrainConfig:
    """DiT from scratch, the softmax baseline that conversions inherit from: 256 images a step, on 8 GPUs 32 each.

        accelerate launch -m lineate train dit:DiT-XL/2 --scratch --data IMAGENET --vae VAE --out RUN \
            --preset softmax --recipe dit --device cuda

    Time: not measured. Expected after these 7 million steps: FID-50K 2.27 with guidance 1.5 (DiT-XL/2).
    """
    return TrainConfig(
        protocol="ft", epochs=1400, batch=32, lr=1e-4, min_lr=1e-4, weight_decay=0.0, ema=0.9999, ema_warmup=False,
        precision="tf32",
    )  # fmt: skip


def sd35_t5() -> TrainConfig:
    """The paper's fine-tuning of SD3.5-Medium, 18 of its 37 attentions replaced (Table 9): 64 images a step, on 4 GPUs 16 each.

        accelerate launch -m lineate train diffusers:stabilityai/stable-diffusion-3.5-medium --data hf:lehduong/flux_generated \
            --out RUN --preset sd35-t5 --recipe sd35-t5 --device cuda

    Time: not measured; the paper says about an hour on 4 H20. Expected by the paper (Table 7): GenEval 0.69, DPG-Bench 84.43.
    The paper names no precision, no share of dropped texts, and no other rate for new parameters: bf16, a tenth and the same.
    Blocks are computed again in the backward pass: `--set train.grad_checkpointing=false` where memory allows.
    """
    return TrainConfig(
        protocol="ft", steps=3000, batch=16, lr=1e-5, min_lr=1e-5, weight_decay=1e-4, augment=Augment(flip=0), precision="bf16",
        grad_checkpointing=True, checkpoint_steps=500,
    )  # fmt: skip


def sd35_ft() -> TrainConfig:
    """The paper's comparison: the same 3,000 steps with softmax kept.

        accelerate launch -m lineate train diffusers:stabilityai/stable-diffusion-3.5-medium --data hf:lehduong/flux_generated \
            --out RUN --preset softmax --recipe sd35-ft --device cuda

    Time: not measured. Expected by the paper (Table 7): GenEval 0.70, DPG-Bench 82.74.
    """
    return sd35_t5()


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "t5": t5, "t5-freeze": t5_freeze, "t5-lora": t5_lora, "deit": deit, "dit5": dit5, "dit": dit, "sd35-t5": sd35_t5,
    "sd35-ft": sd35_ft,
}  # fmt: skip
