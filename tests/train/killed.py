"""Runs that end themselves by SIGKILL at chosen moments, one after another: what `test_resume.py` starts.

python killed.py PROCESSES MOMENT,MOMENT,... fit PLAIN|SHARDED PICTURES OUT      `fit`, with a model made here
python killed.py PROCESSES MOMENT,MOMENT,... COMMAND ARGUMENT...                  a command of lineate's

Moments, in the order in which a run meets them: calibrating, caching, step:N, saving:N, removing:N, leaving, telling, never.
An argument's {run} becomes "part", or "whole" at the moment whole, which never comes either. Every run is forked from here, so
that what it needs is imported once; the exit status of each is printed.
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
from lineate import checkpoint, linearize, runs
from lineate.cli.app import app
from lineate.data import open_data
from lineate.tasks import classes, denoise, prompted  # noqa: F401  for the forked
from lineate.train import checkpoints, latents
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import ImageBatches
from lineate.train.loop import fit
from lineate.train.objectives import objective


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def arm(moment: str, number: int) -> None:
    """Die in the calibration, while a shard is cached, behind step `number`, while its checkpoint is written, while an older one
    is removed, before the model that was written gets its name, or before run.json is there.
    """  # fmt: skip
    digests, rmtree, after_step = checkpoints._digests, shutil.rmtree, checkpoints.State.after_step

    def half_cached(tensors: Any, path: Path, **_: Any) -> NoReturn:
        path.write_bytes(b"half")
        die()

    def stepped(state: Any, *told: Any) -> Any:
        if state.step + 1 == number:
            die()
        return after_step(state, *told)

    def half_written(path: Path) -> Any:
        if path.name == f".step_{number:08d}":
            die()
        return digests(path)

    def half_removed(path: Any, **options: Any) -> None:
        if Path(path).name == f"step_{number:08d}":
            next(Path(path).iterdir()).unlink()
            die()
        rmtree(path, **options)

    places: dict[str, tuple[Any, str, Any]] = {
        "calibrating": (linearize, "calibrate", die),
        "caching": (latents, "save_file", half_cached),
        "step": (checkpoints.State, "after_step", stepped),
        "saving": (checkpoints, "_digests", half_written),
        "removing": (checkpoints.shutil, "rmtree", half_removed),  # type: ignore[attr-defined]
        "leaving": (checkpoint, "_move", die),
        "telling": (runs, "write_json", die),
    }
    if moment not in ("whole", "never"):
        setattr(*places[moment])


def shard_on_the_cpu() -> None:
    """accelerate shards on GPUs only; told that these processes were such, it does it with gloo as well."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def together(processes: int, when: str, *said: str) -> int:
    """The exit status of a run in so many forked processes. When one dies, so do the others, as torchrun has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    running, said = set(), tuple(word.format(run="whole" if when == "whole" else "part") for word in said)
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ.update(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)})
            try:
                moment, _, number = when.partition(":")
                arm(moment, int(number or 0))
                status = main(when, *said[1:]) if said[0] == "fit" else app([*said], standalone_mode=False)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
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


def main(when: str, kind: str, pictures: str, out: str) -> None:
    if kind == "sharded":
        shard_on_the_cpu()
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
    fit(model, batches, objective(config, 5), config, Path(out), resume=True, keep_start=when != "whole")
    if os.environ.get("RANK", "0") == "0":
        (Path(out) / "model").mkdir()
        save_file(model.state_dict(), Path(out) / "model" / "model.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes, moments, *said = sys.argv[1:]
    for moment in moments.split(","):
        print("status", together(int(processes), moment, *said), flush=True)
