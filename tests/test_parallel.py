"""A model spread over processes is the model: outputs, and gradients of pictures and parameters, to fp64's last digits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lineate.convert import Conversion, ConversionError, convert
from lineate.parallel import ParallelError, parallelize

WORKER = Path(__file__).with_name("spread.py")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_spread_over_processes_a_model_is_what_it_was(processes: int) -> None:
    """All of `spread.py`: every core, every family, data parallelism around and beside it, features left spread; over gloo."""
    command = [sys.executable, str(WORKER), str(processes)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Callable[..., DeviceMesh]]:
    """A maker of meshes of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield lambda *shape, **names: init_device_mesh("cpu", shape, **names)
    dist.destroy_process_group()


def test_one_process_has_all_rows(tiny_vit: Callable[..., nn.Module], mesh: Callable[..., DeviceMesh]) -> None:
    model = convert(tiny_vit(), "t5-plus")
    spread = parallelize(copy.deepcopy(model), mesh(1))
    for height, width in ((32, 32), (48, 40)):
        pictures = torch.randn(2, 3, height, width)
        torch.testing.assert_close(spread(pictures), model(pictures))
    assert spread.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("conversion", "changes", "reason"),
    [
        ("softmax", {}, "blocks.0.attn mixes by 'softmax', which needs all tokens; choices: ttt, linear, projqk, hedgehog"),
        ("lit", {}, "blocks.0.attn mixes by 'lit'"),
        (Conversion(sites=("blocks.0.attn",)), {}, r"blocks.1 keeps softmax attention, .*; convert every site"),
        ("t5", {"proj_drop_rate": 0.1}, r"blocks.0.attn.proj_drop drops values \(p=0.1\)"),
    ],
)
def test_what_needs_whole_sequences_is_refused_and_left_as_it_was(
    tiny_vit: Callable[..., nn.Module], mesh: Callable[..., DeviceMesh], conversion: Any, changes: dict[str, Any], reason: str
) -> None:
    model = convert(tiny_vit(**changes), conversion)
    before = repr(model)
    with pytest.raises(ParallelError, match=reason):
        parallelize(model, mesh(1))
    assert repr(model) == before


def test_meshes_and_models_that_do_not_fit_are_refused(
    tiny_vit: Callable[..., nn.Module], mesh: Callable[..., DeviceMesh]
) -> None:
    with pytest.raises(ConversionError, match="not converted"):
        parallelize(tiny_vit(), mesh(1))
    model = convert(tiny_vit(), "t5")
    with pytest.raises(ParallelError, match=r"the mesh has 2 dimensions \('data', 'sequence'\); give one of them"):
        parallelize(model, mesh(1, 1, mesh_dim_names=("data", "sequence")))
    with pytest.raises(ParallelError, match=r"blocks\.0\.attn is spread over processes already"):
        parallelize(parallelize(model, mesh(1)), mesh(1))


def test_the_tables_of_the_document_are_what_the_command_prints() -> None:
    root = Path(__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, root / "benchmarks" / "scale.py"], capture_output=True, text=True, check=True
    ).stdout
    document = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    assert all(table in document for table in printed.strip().split("\n\n"))
