"""Killed at any moment and resumed, a run ends in the weights of one that was never stopped; on one process and across two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("killed.py")
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}

pytestmark = pytest.mark.slow


def run(processes: int, folder: Path, out: Path, *moments: str, kind: str = "plain") -> list[int]:
    """The exit statuses of runs that die at these moments; of several processes the first to die takes the others along."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (SHARDED if kind == "sharded" else {})
    command = [sys.executable, str(WORKER), str(processes), kind, str(folder), str(out), *moments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def never_stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(1, folder, out, "never") == [0]
    return out


def test_killed_at_any_moment_and_resumed(folder: Path, never_stopped: Path, tmp_path: Path) -> None:
    """Killed before any checkpoint, within an epoch, while one is written, while an old one is removed; again and again."""
    moments = ["step:1", "step:7", "saving:8", "removing:6", "step:13", "saving:20"]
    assert run(1, folder, tmp_path, *moments, "never") == [-signal.SIGKILL] * len(moments) + [0]
    assert same(weights(tmp_path), weights(never_stopped))
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_killed_and_resumed_across_two_processes(folder: Path, never_stopped: Path, tmp_path: Path, kind: str) -> None:
    """Replicated (DDP) and sharded (FSDP2) over gloo."""
    assert run(2, folder, tmp_path / "whole", "never", kind=kind) == [0]
    *died, ended = run(2, folder, tmp_path / "part", "step:3", "saving:6", "never", kind=kind)
    assert all(died) and ended == 0
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert not same(weights(tmp_path / "part"), weights(never_stopped))
