"""Converted models spread over processes, beside the same models whole: what `test_parallel.py` starts.

python spread.py PROCESSES    runs every check of that number of processes over gloo, in forks of one that has the imports
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from timm.models import Eva, VisionTransformer
from tiny import PLAIN, VISION, dit, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lineate.convert import Conversion, convert, core_modules
from lineate.core import CoreAttention, CoreConfig, Neighborhood
from lineate.families import detect
from lineate.layout import LayoutError, TokenLayout
from lineate.mixers.linear import HedgehogConfig, LinearConfig, ProjQKConfig
from lineate.mixers.ttt import TTTConfig
from lineate.ops import sharded
from lineate.ops.sharded import Share
from lineate.parallel import ShardedCore, parallelize
from lineate.train.protocols import leave_unreached

HOST = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "dynamic_img_size": True}
NEAR = Neighborhood(window=3, mix="learned")
# Every part of a core once, with every other that it meets on the way.
CORES = {
    "t5": CoreConfig(outside="exact"),
    "t5-plus, 2 layers, l2": CoreConfig(mixer=TTTConfig(inner="2layer", loss="l2"), neighborhood=NEAR, outside="exact"),
    "dit5": CoreConfig(mixer=TTTConfig(inner="2layer", loss="l2"), neighborhood=NEAR, qk_affine=True),
    "modality": CoreConfig(key_norm_scope="modality"),
    "values convolved": CoreConfig(mixer=TTTConfig(inner="3layer"), key_norm="instance-no-mean", locality="dwc-v"),
    "tokens convolved": CoreConfig(mixer=TTTConfig(inner="1layer-gate"), key_norm="instance-no-std", locality="cpe"),
    "linear": CoreConfig(mixer=LinearConfig(), key_norm="none", locality="none", outside="exact"),
    "projqk": CoreConfig(mixer=ProjQKConfig(), key_norm="layer"),
    "hedgehog": CoreConfig(mixer=HedgehogConfig(), key_norm="rms", neighborhood=NEAR),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "timm, class token": (lambda: VisionTransformer(**HOST), "t5"),
    "timm, mean, registers": (lambda: VisionTransformer(**HOST, class_token=False, reg_tokens=2, global_pool="avg"), "t5-2layer"),
    "timm, rotary": (lambda: Eva(**HOST, use_rot_pos_emb=True, use_abs_pos_emb=False), CORES["t5-plus, 2 layers, l2"]),
    "transformers, DINOv2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)), "t5"),
    "transformers, DINOv3": (lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**PLAIN)), "t5-paper"),
    "DiT": (dit, CORES["dit5"]),
}


def stirred(module: nn.Module) -> nn.Module:
    """In fp64, every parameter moved off its start: the same on all processes, as the seed is."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """To fp64's precision; the hosts resample positions in fp32."""
    rtol, atol = (1e-4, 1e-6) if "pos" in what else (1e-9, 1e-10)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def mean(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Over the processes: what data parallelism makes of gradients."""
    dist.all_reduce(x, group=mesh.get_group())
    return x / mesh.size()


def check_core(name: str, config: CoreConfig, mesh: DeviceMesh) -> None:
    """Outputs, and gradients of inputs and parameters, of embed and forward; rows unevenly spread."""
    layout = TokenLayout(2 * mesh.size() + 1, 3, prefix=2, suffix=1)
    whole = stirred(CoreAttention(config, 3, 8))
    spread: Any = copy.deepcopy(whole)
    share, spread.__class__ = Share(mesh), ShardedCore
    spread.share = share
    leaves = [torch.randn(2, 3, layout.tokens, 8, dtype=torch.float64) for _ in "qkv"]
    tokens, slope = (torch.randn(2, layout.tokens, 24, dtype=torch.float64) for _ in range(2))
    results = []
    for core, mine in ((whole, lambda x: x), (spread, lambda x: share.own(x, layout))):
        inputs = [x.clone().requires_grad_() for x in (*leaves, tokens)]
        q, k, v, x = (mine(x) for x in inputs)
        out = core(q, k, v, layout).transpose(1, 2).flatten(2) + core.embed(x, layout)
        out = out if core is whole else share.gathered(out, layout)
        (out * slope).sum().backward()
        results.append({"output": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)})
        results[-1] |= {n: p.grad for n, p in core.named_parameters()}
    for part, expected in results[0].items():
        found = results[1][part] if part == "output" else mean(results[1][part], mesh)
        close(found, expected, f"core {name}, {part}")


def check_communication(mesh: DeviceMesh) -> None:
    """The numbers of docs/scale.md, whatever the height; for the middle processes, which have two neighbours."""
    core: Any = CoreAttention(CORES["t5-plus, 2 layers, l2"], 3, 8)
    core.__class__, core.share = ShardedCore, Share(mesh)
    neighbours = (core.share.rank > 0) + (core.share.rank < mesh.size() - 1)
    expected = {"sum": 2 * (24 + 24 + 2 * 24 * 8 + 3 * (24 + 3)), "max": 2 * 3 * 3, "rows": 2 * 5 * 24 * neighbours * (2 + 2)}
    for height in (2 * mesh.size(), 5 * mesh.size()):
        sent = dict.fromkeys(expected, 0)

        def reduced(x: Tensor, kind: str, group: Any, sent: dict[str, int] = sent) -> Tensor:
            sent[kind] += x.numel()
            return x

        def exchanged(x: Tensor, *splits: Any, sent: dict[str, int] = sent) -> Tensor:
            sent["rows"] += x.numel()
            return x

        layout = core.share.part(TokenLayout(height, 5, prefix=2, suffix=1))
        with patch.multiple(sharded.collectives, all_reduce=reduced, all_to_all_single=exchanged):
            q, k, v = (torch.randn(2, 3, layout.tokens, 8) for _ in "qkv")
            core(q, k, v, TokenLayout(height, 5, prefix=2, suffix=1))
        assert sent == expected, f"{height} rows: {sent}, not {expected}"


def draw(model: nn.Module, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Inputs of a model whose patches are so many, in fp64, the first with a gradient."""
    high, wide = detect(model).geometry(model).patch
    x = torch.randn(2, 3, rows * high, columns * wide, dtype=torch.float64, requires_grad=True)
    return (x, torch.tensor([3, 977]), torch.tensor([4, 5])) if detect(model).name == "lineate" else (x,)


def answer(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    out = run(*inputs)
    found: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
    return found


def check_model(name: str, mesh: DeviceMesh) -> None:
    """Under DistributedDataParallel, at two grids that are not squares: outputs, and gradients of pictures and parameters."""
    make, conversion = MODELS[name]
    asked = conversion if isinstance(conversion, str) else Conversion(**conversion.model_dump())
    whole = stirred(convert(make().eval(), asked))
    answer(whole, draw(whole, 2, 3)).sum().backward()
    leave_unreached(whole, gradients(whole))  # DistributedDataParallel waits for whatever could have a gradient
    spread = parallelize(copy.deepcopy(whole), mesh)
    wrapped = DistributedDataParallel(spread, process_group=mesh.get_group())
    for rows, columns in ((2 * mesh.size() + 1, 3), (3 * mesh.size() - 1, 5)):
        inputs = draw(whole, rows, columns)
        expected = answer(whole, inputs)
        slope = torch.randn_like(expected)
        (expected * slope).sum().backward()
        pictures = inputs[0].detach().requires_grad_()
        found = answer(wrapped, (pictures, *inputs[1:]))
        close(found, expected, name)
        (found * slope).sum().backward()
        close(mean(pictures.grad, mesh), inputs[0].grad, f"{name}, pictures")
        for (parameter, there), here in zip(whole.named_parameters(), spread.parameters(), strict=True):
            if there.grad is not None:
                close(here.grad, there.grad, f"{name}, {parameter}")
        whole.zero_grad()
        spread.zero_grad()


def check_fully_sharded(mesh: DeviceMesh) -> None:
    """Parameters spread by FSDP over the same processes."""
    whole = stirred(convert(VisionTransformer(**HOST).eval(), "t5"))
    spread: Any = parallelize(copy.deepcopy(whole), mesh)
    for block in spread.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(spread, mesh=mesh)
    pictures = draw(whole, 2 * mesh.size(), 3)[0].detach()
    for model in (whole, spread):
        model(pictures).square().sum().backward()
    for (name, there), here in zip(whole.named_parameters(), spread.parameters(), strict=True):
        close(here.grad.full_tensor(), there.grad, f"fully_shard, {name}")


def check_two_dimensions() -> None:
    """Data parallelism beside it: two halves of a batch, each on two processes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    whole = stirred(convert(VisionTransformer(**HOST).eval(), "t5"))
    spread = DistributedDataParallel(parallelize(copy.deepcopy(whole), mesh["sequence"]))
    pictures = draw(whole, 5, 3)[0].detach()
    whole(pictures).square().mean().backward()
    spread(pictures.chunk(2)[mesh.get_local_rank("data")]).square().mean().backward()
    for (name, there), here in zip(whole.named_parameters(), spread.parameters(), strict=True):
        close(here.grad, there.grad, f"two dimensions, {name}")


def check_without_gathering(mesh: DeviceMesh) -> None:
    """Each process has its own rows' features, and all have the class token's logits; a copy does the same."""
    whole: Any = stirred(convert(VisionTransformer(**HOST).eval(), "t5"))
    spread: Any = copy.deepcopy(parallelize(copy.deepcopy(whole), mesh, gather=False))
    pictures, layout = draw(whole, 9, 4)[0].detach(), TokenLayout(9, 4, prefix=1)
    close(spread(pictures), whole(pictures), "logits")
    close(spread.forward_features(pictures), Share(mesh).own(whole.forward_features(pictures), layout), "features")
    assert all(type(core) is ShardedCore for core in core_modules(spread).values())


def check_few_rows(mesh: DeviceMesh) -> None:
    """A picture too flat for the mesh is refused on every process, before anything is sent."""
    model = parallelize(convert(VisionTransformer(**HOST).eval(), "t5-plus"), mesh)
    rows = 3 * mesh.size() - 1
    try:
        model(draw(model, rows, 3)[0].float())
    except LayoutError as error:
        assert f"{rows} rows of patches leave one of {mesh.size()} processes 2, and this model needs 3" in str(error), error
    else:
        raise AssertionError("windows of 5 were answered from 2 rows")


def one(rank: int, processes: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    checks: list[Callable[[], None]] = [lambda n=n, c=c: check_core(n, c, mesh) for n, c in CORES.items()]
    checks += [lambda n=n: check_model(n, mesh) for n in MODELS]
    rest = (check_communication, check_without_gathering, check_few_rows, check_fully_sharded)
    checks += [lambda c=c: c(mesh) for c in rest]
    checks += [check_two_dimensions] if processes == 4 else []
    for check in checks:
        torch.manual_seed(0)
        check()
    dist.destroy_process_group()


def main(processes: int) -> int:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=one, args=(r, processes, str(Path(folder) / "store"))) for r in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join()
    return max(abs(process.exitcode or 0) for process in started)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
