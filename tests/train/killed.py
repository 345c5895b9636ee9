"""One process of a run that ends itself by SIGKILL at a chosen moment, or not: what `test_resume.py` starts.

python killed.py PICTURES OUT MOMENT    MOMENT: never, step:N, saving:N, removing:N; "sharded" as a fourth word shards
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer

import lineate
from lineate.data import open_data
from lineate.train import checkpoints
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import ImageBatches
from lineate.train.loop import fit
from lineate.train.objectives import objective


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def arm(moment: str, number: int) -> None:
    """Die while the checkpoint of step `number` is written, or while an older one is removed."""
    digests, rmtree = checkpoints._digests, shutil.rmtree

    def half_written(path: Path) -> Any:
        if path.name == f".step_{number:08d}":
            die()
        return digests(path)

    def half_removed(path: Any, **options: Any) -> None:
        if Path(path).name == f"step_{number:08d}":
            next(Path(path).iterdir()).unlink()
            die()
        rmtree(path, **options)

    if moment == "saving":
        checkpoints._digests = half_written
    elif moment == "removing":
        checkpoints.shutil.rmtree = half_removed  # type: ignore[attr-defined]


def shard_on_the_cpu() -> None:
    """accelerate shards on GPUs only; told that these processes were such, it does it with gloo as well."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(pictures: str, out: str, when: str, *more: str) -> None:
    moment, _, number = when.partition(":")
    arm(moment, int(number or 0))
    if more == ("sharded",):
        shard_on_the_cpu()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    host = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, dynamic_img_size=True, proj_drop_rate=0.2
    )
    model = lineate.convert(host)
    augment = Augment(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, repeats=2)
    config = TrainConfig(
        epochs=3, batch=4, workers=1, tracker="none", lr=1e-3, warmup_epochs=1, augment=augment, checkpoint_steps=2, clip_grad=1.0
    )
    batches = ImageBatches(open_data(pictures, split=None), config, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)

    def watch(done: int, total: int, what: str) -> None:
        if moment == "step" and done == int(number):
            die()

    fit(model, batches, objective(config, 5), config, Path(out), resume=True, progress=watch)
    if os.environ.get("RANK", "0") == "0":
        save_file(model.state_dict(), Path(out) / "final.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
