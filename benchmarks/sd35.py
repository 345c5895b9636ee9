"""SD3.5-Medium at its real size with random weights, original against converted: multiply-adds, latency and memory of denoising.

    python benchmarks/sd35.py macs     any machine, a minute or two: on tensors without values; a multiply-add counts one
    python benchmarks/sd35.py time     on a GPU: bf16, eager and compiled, one step and a run of 28, with guidance (batch 2)
                                       elsewhere: a shrunken model (4 blocks of 256 channels, float32) at small sizes, one step;
                                       written after every size, so that what was measured stays when the rest is stopped

A step is one pass of the transformer over the latents of one picture and 333 tokens of text, once with the prompt and once
without. Text encoders and the autoencoder, which no conversion touches, are not in it. Random weights take as long as trained
ones. Models take turns, so that a clock that drifts drifts for all; medians and interquartile ranges. Figures go to
benchmarks/results/sd35-*.json; experiments/figure6.py draws the real size's beside the paper's, docs/performance.md lists all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lineate
from lineate import runs
from lineate.evaluate.cost import peak_mib, time_ms
from lineate.text2image.texts import quietly

RESULTS = Path(__file__).parent / "results"
MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SHRUNKEN = MEDIUM | {
    "num_layers": 4, "dual_attention_layers": (0, 1), "num_attention_heads": 4, "caption_projection_dim": 256,
    "joint_attention_dim": 256, "pooled_projection_dim": 256,
}  # fmt: skip
MODELS: dict[str, str | lineate.Conversion] = {"original": "softmax", "paper's 18": "sd35-t5", "all 37": "sd35-t5-all"}
SHRUNKEN_MODELS: dict[str, str | lineate.Conversion] = {
    "original": "softmax",
    "3 of 6": lineate.preset("sd35-t5").model_copy(update={"sites": ("*.attn2", "*.[-1:].attn")}),  # the last for the last five
    "all 6": "sd35-t5-all",
}
SIZES_PX = (1024, 1536, 2048, 4096)
SHRUNKEN_SIZES_PX = (256, 512, 1024)
TEXT_TOKENS, STEPS = 333, 28


def build(geometry: dict[str, Any], conversion: str | lineate.Conversion, device: str, dtype: torch.dtype) -> nn.Module:
    """The model, converted, with random weights."""
    with torch.device(device), quietly():
        model = SD3Transformer2DModel(**geometry).eval().requires_grad_(False).to(dtype)
    return lineate.convert(model, conversion)


def inputs(model: Any, px: int, batch: int) -> tuple[Tensor, ...]:
    """Latents, text, pooled text and times, for square pictures of `px`; latents have an eighth of the pixels a side."""
    said, config = {"device": model.device, "dtype": model.dtype}, model.config
    return (
        torch.randn(batch, config.in_channels, px // 8, px // 8, **said),
        torch.randn(batch, TEXT_TOKENS, config.joint_attention_dim, **said),
        torch.randn(batch, config.pooled_projection_dim, **said),
        torch.full((batch,), 500.0, device=model.device),
    )


def macs() -> dict[str, Any]:
    """GMACs of one pass for one picture, without guidance, by model and size; and each model's parameters."""
    found: dict[str, Any] = {"unit": "GMACs", "text_tokens": TEXT_TOKENS, "counts": {}, "parameters": {}}
    for name, conversion in MODELS.items():
        model = build(MEDIUM, conversion, "meta", torch.bfloat16)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found["parameters"][name] = sum(parameter.numel() for parameter in model.parameters())
            found["counts"][name] = {px: _count(model, px) for px in SIZES_PX}
        print(name, found["parameters"][name], found["counts"][name], flush=True)
    return found


def _count(model: nn.Module, px: int) -> float:
    given = inputs(model, px, 1)
    with FlopCounterMode(display=False) as counter:
        model(*given)
    return counter.get_total_flops() / 2 / 1e9


def denoise(model: nn.Module, given: tuple[Tensor, ...], guidance: float = 3.5) -> Tensor:
    """A run of `STEPS` steps from noise."""
    latents, *beside, _ = given
    latents = latents[:1]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS, device=latents.device)
    for moment in scheduler.timesteps:
        plain, prompted = model(torch.cat([latents, latents]), *beside, moment.expand(2), return_dict=False)[0].chunk(2)
        latents = scheduler.step(plain + guidance * (prompted - plain), moment, latents, return_dict=False)[0]
    return latents


@torch.inference_mode()
def timings(device: str, repeats: int, sizes: tuple[int, ...]) -> Iterator[list[dict[str, Any]]]:
    """Size by size a row for each model, and whether it was compiled: on GPUs alone, and runs of all steps are for GPUs too."""
    real = device == "cuda"
    geometry, chosen = (MEDIUM, MODELS) if real else (SHRUNKEN, SHRUNKEN_MODELS)
    models = {name: build(geometry, chosen[name], device, torch.bfloat16 if real else torch.float32) for name in chosen}
    for px, compiled in product(sizes, (False, True) if real else (False,)):
        torch._dynamo.reset()
        given = inputs(next(iter(models.values())), px, 2)
        ready = {name: torch.compile(model) if compiled else model for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats + 1):
            for name, model in ready.items():
                times[name].append(time_ms(partial(model, *given), torch.device(device)))
        rows = []
        for name, (_, *measured) in times.items():  # the first call compiled, and took its workspaces
            low, median, high = statistics.quantiles(measured, n=4, method="inclusive")
            row = {"px": px, "model": name, "compiled": compiled, "repeats": repeats, "step_ms": median, "iqr_ms": high - low}
            row["run_s"] = time_ms(partial(denoise, ready[name], given), torch.device(device)) / 1e3 if real else None
            row["peak_mib"] = (
                None if compiled else round(peak_mib(models[name], given[0], partial(_beside, models[name], given[1:])))
            )
            rows.append(row)
            print(json.dumps(row), flush=True)
        yield rows


def _beside(model: nn.Module, rest: tuple[Tensor, ...], latents: Tensor) -> object:
    return model(latents, *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("macs", "time"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=lambda text: tuple(int(px) for px in text.split(",")))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if args.what == "time" and torch.cuda.is_available() else "cpu"
    about = {"command": ["benchmarks/sd35.py", *sys.argv[1:]], "created": runs.now()}
    made = {"environment": runs.environment(torch.device(device))}
    if args.what == "macs":
        runs.write_json(args.out or RESULTS / "sd35-macs.json", about | macs() | made)
        return
    real = device == "cuda"
    rows: list[dict[str, Any]] = []
    about |= {"geometry": "SD3.5-Medium" if real else "shrunken", "model": MEDIUM if real else SHRUNKEN}
    about |= {"dtype": "bfloat16" if real else "float32", "batch": 2, "text_tokens": TEXT_TOKENS, "steps": STEPS}
    for some in timings(device, args.repeats, args.sizes or (SIZES_PX if real else SHRUNKEN_SIZES_PX)):
        rows += some
        runs.write_json(args.out or RESULTS / f"sd35-time-{device}.json", about | {"rows": rows} | made)


if __name__ == "__main__":
    main()
