"""What every run leaves behind: its folder, in one piece or not at all, and what it takes to repeat it.

A folder that is there is only replaced with --overwrite and only if it holds a run and nothing else; it is put aside meanwhile
and comes back if the new run fails. A run that fails leaves nothing, unless its model or a checkpoint of its training had been
saved: that is kept.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lineate.evaluate.cost import device_name

MODEL = "model/lineate.json"  # there once the model is saved whole
HISTORY = "history.jsonl"
CALIBRATED = "calibration.json"  # what came of a calibration, for a training after it that is resumed
RUN_PARTS = ("model", "run.json", "pictures", "report.html", "checkpoints", HISTORY, "logs", CALIBRATED)
ANALYSIS_PARTS = ("analysis.json", "pictures")
VERSIONS = ("torch", "timm", "accelerate", "datasets", "numpy", "pillow", "pydantic", "safetensors", "matplotlib")


class RunError(ValueError):
    """A run cannot be put where it was asked for, or done on the device asked for; the message is one line."""


def check_folder(out: Path, overwrite: bool, parts: Sequence[str] = RUN_PARTS) -> None:
    """Raise `RunError` if something stands at `out` that must not be replaced. `parts` are the names that a run may hold."""
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"{out} is a file; the output is a folder")
    if not overwrite:
        raise RunError(f"{out} exists; pass --overwrite to replace it")
    found = sorted(path.name for path in out.iterdir())
    foreign = [name for name in found if name not in parts and not _unfinished(name, parts)]
    ours = not found or any((out / mark).is_file() for mark in ("run.json", "analysis.json", HISTORY, MODEL))
    if foreign or not ours:
        raise RunError(f"{out} holds {(foreign or found)[0]!r}, which is no part of a run; it is not overwritten")


def _unfinished(name: str, parts: Sequence[str] = RUN_PARTS) -> bool:
    """Whether a process that was killed was writing this: parts are written under another name and then renamed."""
    named = re.fullmatch(r"\.(.+?)(\.[0-9a-f]{8}(\.old)?)?", name)
    return name == "report.html.partial" or (named is not None and named[1] in parts)


def has_checkpoint(out: Path) -> bool:
    """Whether a training at `out` left a checkpoint to go on from."""
    return any((out / "checkpoints").glob("step_*"))


def check_resumable(out: Path, overwrite: bool, resume: bool) -> None:
    """Raise `RunError` if what stands at `out` must be neither replaced nor resumed."""
    if resume and overwrite:
        raise RunError("--resume goes on with what --overwrite would remove; give one of them")
    if has_checkpoint(out) and not overwrite:
        if not resume:
            raise RunError(f"{out} holds a run; pass --resume to go on with it, or --overwrite to replace it")
        return
    begun = (out / HISTORY).is_file() or (out.is_dir() and not any(out.iterdir()))  # killed before it wrote anything
    if not resume or not begun:
        check_folder(out, overwrite)


def check_alone(command: str) -> None:
    """Raise `RunError` where several processes were launched to do the same."""
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RunError(
            f"{command} is one process's work, and {launched} were launched; many train: accelerate launch -m lineate train"
        )


def check_file(out: Path | None, overwrite: bool) -> None:
    """Raise `RunError` if something stands at `out` that must not be replaced."""
    if out is not None and out.exists() and not (overwrite and out.is_file()):
        raise RunError(f"{out} exists; pass --overwrite to replace it" if out.is_file() else f"{out} is not a file")


@contextmanager
def run_folder(out: Path, overwrite: bool, parts: Sequence[str] = RUN_PARTS) -> Iterator[Path]:
    """A new folder at `out` to write a run into; on an error, Ctrl-C included, see the module docstring.

    What was kept is added to the exception as a note.
    """
    check_folder(out, overwrite, parts)
    made = [folder for folder in out.resolve().parents if not folder.exists()]
    aside = out.with_name(f".{out.resolve().name}.{secrets.token_hex(4)}.old")
    try:
        if out.exists():
            out.rename(aside)
        out.mkdir(parents=True)
        yield out
    except BaseException as error:
        saved = (out / MODEL).is_file()
        if saved:
            error.add_note(f"the model in {out / 'model'} is whole and was kept")
        if saved or has_checkpoint(out):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(out, ignore_errors=True)
            if aside.exists():
                aside.rename(out)
                error.add_note(f"{out} is as it was")
            for folder in made:
                with suppress(OSError):  # somebody else put something there
                    folder.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def training_folder(out: Path, overwrite: bool, resume: bool) -> Iterator[Path]:
    """The folder of a run that can be resumed, the old one or a new one, with a history that marks it as a run."""
    if resume and out.is_dir():
        for path in [path for path in out.iterdir() if _unfinished(path.name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / HISTORY).touch()
        yield out
        return
    with run_folder(out, overwrite):
        (out / HISTORY).touch()
        yield out


def find_device(name: str) -> torch.device:
    """The device called `name`, cpu or cuda. Raises `RunError` if there is none."""
    if name not in ("cpu", "cuda"):
        raise RunError(f"unknown device {name!r}; choices: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("no CUDA device is available; choices here: cpu")
    return torch.device(name)


def find_precision(name: str) -> torch.dtype:
    """The type that `name` stands for: fp32, bf16 or fp16. Raises `RunError`."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in types:
        raise RunError(f"unknown precision {name!r}; choices: {', '.join(types)}")
    return types[name]


def environment(device: torch.device) -> dict[str, Any]:
    """Python, library versions, device, platform, and the commit of the lineate checkout, if it is one."""
    versions = {}
    for package in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit, dirty = _commit(Path(__file__).parent)
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": device_name(device),
        "platform": platform.platform(),
        "commit": commit,
        "dirty": dirty,
    }


def _commit(package: Path) -> tuple[str | None, bool | None]:
    """The commit that `package` is at and whether its files differ from it; None, None where git does not track it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie inside somebody else's repository
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None


def command_line() -> list[str]:
    """The command that this process was started with, its program as a user types it."""
    return ["lineate", *sys.argv[1:]]


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all; numbers that are not finite become null."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
