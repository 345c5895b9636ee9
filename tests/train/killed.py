"""Runs that end themselves by SIGKILL at chosen moments, one after another: what `test_resume.py` starts.

python killed.py PROCESSES PLAIN|SHARDED PICTURES OUT MOMENT...    MOMENT: never, step:N, saving:N, removing:N

Every run is forked from here, so that what it needs is imported once; the exit status of each is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import accelerate  # noqa: F401  for the forked
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


def together(processes: int, *said: str) -> int:
    """The exit status of a run in so many forked processes. When one dies, so do the others, as torchrun has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    running = set()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ.update(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)})
            try:
                main(*said)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        running.add(child)
    status = 0
    while running:
        child, ended = os.wait()
        running.remove(child)
        if ended and not status:
            status = os.waitstatus_to_exitcode(ended)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return status


def main(kind: str, pictures: str, out: str, when: str) -> None:
    moment, _, number = when.partition(":")
    arm(moment, int(number or 0))
    if kind == "sharded":
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
    number, kind, pictures, out, *moments = sys.argv[1:]
    for moment in moments:
        print(together(int(number), kind, pictures, out, moment), flush=True)
