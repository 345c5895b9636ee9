"""The small scale: CIFAR-10 and a ViT that a CPU can train, as long a sequence as DeiT's (patch 2 on 32×32 px: N = 256).

    python experiments/small.py --data ../shared/data/cifar10         trains the softmax baseline, once, into results/small/host

A DeiT in the small: no class token, mean pooling, 3 blocks, 2 heads of 24. Every conversion of the tables starts from this one
host and gets a tenth of its epochs, with the new parameters at 20 times the others' rate, as in the paper. Two cores make such a
row in about three minutes; where there is a GPU it is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from lineate import checkpoint, runs
from lineate.calibrate import CalibrationConfig
from lineate.convert import convert
from lineate.data import LabelledImages, open_data
from lineate.evaluate.top1 import Preprocessing, top_k
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import ImageBatches
from lineate.train.loop import FitResult, fit
from lineate.train.objectives import objective

HOST = Path(__file__).parent / "results" / "small" / "host"
DATA = "../shared/data/cifar10"
SIZE, MEAN, STD = 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = 10
EPOCHS = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Short, and so without what a long training profits from: no mixing, small steps at a high rate.
BASELINE = TrainConfig(
    epochs=EPOCHS, batch=32, lr=2e-3, min_lr=2e-5, warmup_epochs=0.1, weight_decay=0.05, clip_grad=1.0,
    augment=Augment(crop="pad"), tracker="none", workers=0,
)  # fmt: skip
TUNING = BASELINE.model_copy(
    update={
        "epochs": EPOCHS / 10,
        "lr": 1e-4,
        "min_lr": 1e-6,
        "warmup_epochs": EPOCHS / 60,
        "new_lr_multiplier": 20.0,
    }
)
CALIBRATION = CalibrationConfig(steps=500, batch=8, pool=512)


def tuning(protocol: str | None, fields: list[str], seed: int, share: float = 1.0) -> TrainConfig | None:
    """How a conversion is tuned: the common config for a share of its epochs, `train.FIELD=VALUE` set; None for no protocol."""
    if protocol is None:
        return None
    values = dict(field.removeprefix("train.").split("=", 1) for field in fields)
    length = {"epochs": share * TUNING.epochs, "warmup_epochs": share * TUNING.warmup_epochs}
    return TrainConfig.model_validate(TUNING.model_dump() | length | values | {"protocol": protocol, "seed": seed})


def build() -> nn.Module:
    """The host, freshly drawn."""
    return VisionTransformer(
        img_size=SIZE, patch_size=2, embed_dim=48, depth=3, num_heads=2, num_classes=CLASSES,
        class_token=False, global_pool="avg", fc_norm=False,
    ).to(DEVICE)  # fmt: skip


def tune(model: nn.Module, config: TrainConfig, data: LabelledImages, out: Path, **options: Any) -> FitResult:
    """Train `model` on `data` as `config` says."""
    batches = ImageBatches(data, config, size=SIZE, mean=MEAN, std=STD)
    return fit(model, batches, objective(config, CLASSES), config, out, **options)


def prepared() -> Callable[[Any], Tensor]:
    """From a picture, whole and as it is, to what the host sees."""
    shown = Preprocessing(image_size=SIZE, crop_pct=1.0, crop_mode="center", interpolation="bicubic", mean=MEAN, std=STD)
    return shown.transform()


def evaluate(model: nn.Module, data: LabelledImages) -> Any:
    """What the model says of every picture: an `Outcome`."""
    return top_k(model, data, prepared(), batch=25)


def unlabelled(data: LabelledImages, count: int, seed: int) -> Tensor:
    """(count, 3, 32, 32): training pictures to calibrate on, drawn by `seed`."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    transform = prepared()
    return torch.stack([transform(data[int(index)][0]) for index in chosen])


def main() -> None:
    """Train the baseline and save it, with its results beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("runs/small-host"), help="checkpoints: a broken training goes on there")
    options = parser.parse_args()
    checkpoint.check_target(HOST, overwrite=False)
    if options.threads:
        torch.set_num_threads(options.threads)
    environment = runs.environment(DEVICE)
    train, test = (open_data(options.data, split=split) for split in ("train", "test"))
    torch.manual_seed(BASELINE.seed)
    model = convert(build(), "softmax")
    tuned = tune(model, BASELINE, train, options.work, resume=True, say=print,
                 evaluate=lambda trained: {"top1": evaluate(trained, test).figures.top1.value})  # fmt: skip
    final = evaluate(model, test).figures
    checkpoint.save(model, HOST)
    runs.write_json(HOST / "run.json", {"train": BASELINE.model_dump(mode="json"), "tuning": tuned.model_dump(mode="json"),
                                        "final": final.model_dump(mode="json"), "environment": environment})  # fmt: skip
    print(final.top1)


if __name__ == "__main__":
    main()
