"""docs/performance.md, from the result files: python benchmarks/performance.py

What has no file is listed as unmeasured, with the command that measures it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_BENCH = "lineate bench embedded --sizes 224,336,518,1022"
_HALF = "lineate bench --precision bf16"
_DIT = f"{_HALF} dit:DiT-XL/2 --preset dit5"
_GPU = "python benchmarks/ops.py --device cuda --dtype bfloat16 --batch 2 --heads 24 --loss l2"
# name of the result file: what it shows and the command behind it, without --out
WANTED = {
    "cpu-ops": ("The operator, forward, CPU", "python benchmarks/ops.py --tokens 256,1024,4096"),
    "cpu-ops-backward": ("The operator, forward and backward, CPU", "python benchmarks/ops.py --tokens 1024,4096 --backward"),
    "cpu-t5-2layer": ("ViT-S/14 end to end, 2-layer, CPU", f"{_BENCH} --preset t5-2layer"),
    "cpu-t5": ("ViT-S/14 end to end, SwiGLU, CPU", f"{_BENCH} --preset t5"),
    "cpu-t5-plus": ("ViT-S/14 end to end, with the neighborhood branch, CPU", f"{_BENCH} --preset t5-plus"),
    "cpu-t5-2layer-bf16": ("ViT-S/14 end to end, 2-layer, both in bf16, CPU", f"{_BENCH} --preset t5-2layer --precision bf16"),
    "cpu-t5-bf16": ("ViT-S/14 end to end, SwiGLU, both in bf16, CPU", f"{_BENCH} --preset t5 --precision bf16"),
    "cpu-t5-2layer-compiled": ("ViT-S/14 end to end, 2-layer, both compiled, CPU", f"{_BENCH} --preset t5-2layer --compile"),
    **{
        f"cpu-deit-s-{preset}{half}": (
            f"DeiT-S at its own size, {model}{', both in bf16' if half else ''}, CPU",
            f"{_HALF if half else 'lineate bench'} timm:deit_small_patch16_224 --preset {preset} --sizes 224",
        )
        for preset, model in {"t5-2layer": "2-layer", "t5": "SwiGLU", "t5-plus": "with the neighborhood branch"}.items()
        for half in ("", "-bf16")
    },
    "cpu-dit-xl": ("A step of DiT-XL/2, by the side of the latents, CPU", f"{_DIT} --sizes 32,64,128"),
    "exported": ("ViT-S/14 end to end, SwiGLU, both as ONNX graphs under onnxruntime, CPU", "python benchmarks/exported.py"),
    "exported-openvino": (
        "ViT-S/14 end to end, SwiGLU, both as ONNX graphs under OpenVINO, CPU",
        "python benchmarks/exported.py --runtime openvino",
    ),
    "gpu-ops": ("The operator, forward, GPU", f"{_GPU} --tokens 1024,4096,16384,65536"),
    "gpu-ops-backward": ("The operator, forward and backward, GPU", f"{_GPU} --tokens 1024,4096,16384 --backward"),
    "gpu-dinov2-s": ("ViT-S/14 end to end, SwiGLU, GPU", f"{_HALF} embedded --sizes 224,448,1022,2044 --device cuda"),
    "gpu-deit-s": (
        "DeiT-S end to end, GPU",
        f"{_HALF} timm:deit_small_patch16_224 --sizes 224,512,1024 --device cuda",
    ),
    "gpu-dit-xl": ("A step of DiT-XL/2, by the side of the latents, GPU", f"{_DIT} --sizes 32,64,128,256 --device cuda"),
    "sd35-time-cpu": ("A denoising step of Stable Diffusion 3.5, shrunken, CPU", "python benchmarks/sd35.py time"),
    "sd35-time-cuda": ("A denoising step of Stable Diffusion 3.5-Medium, GPU", "python benchmarks/sd35.py time"),
}


def provenance(result: dict[str, Any]) -> str:
    """Machine, library, commit and command in one line."""
    made = result["environment"]
    commit = f"commit {made['commit'][:7]}{', changed' if made['dirty'] else ''}" if made["commit"] else "no commit"
    place = f"{made['device']}, torch {made['versions']['torch']}, {commit}, {result['created'][:10]}"
    return f"{place}: `{' '.join(result['command'])}`"


def operator(result: dict[str, Any]) -> list[str]:
    """One line for each contender at each size."""
    limits, asked = result["ceilings"], result["asked"]
    lines = [
        f"{asked['dtype']}, batch {asked['batch']}, {asked['heads']} heads, {asked['loss']} loss. Copy {limits['copy_gb_s']:.0f} "
        f"GB/s, GEMM {limits['gemm_gmac_s']:.0f} Gmac/s.",
        "",
        "| tokens | head dim | inner model | | ms (IQR) | against the fastest softmax | of the floor | peak MiB | saved MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        ran = {name: found for name, found in row["contenders"].items() if "ms" in found}
        softmax = min((found["ms"] for name, found in ran.items() if name.startswith("sdpa")), default=float("nan"))
        for name, found in ran.items():
            cells = [f"{found['ms']:.1f} ({found['iqr_ms']:.1f})", f"{softmax / found['ms']:.2f}×"]
            cells.append(f"{found['of_floor']:.0%}" if "of_floor" in found and not name.startswith("sdpa") else "")
            cells += [f"{found[key]:.1f}" if key in found else "" for key in ("peak_mib", "saved_mib")]
            lines.append(f"| {row['tokens']} | {row['head_dim']} | {row['model']} | {name} | {' | '.join(cells)} |")
    return lines


def timed(row: dict[str, Any]) -> str:
    """The cells of both models' times and of their ratio."""
    times = [f"{row[f'{name}_ms']:.0f} ({row[f'{name}_iqr_ms']:.0f})" for name in ("original", "converted")]
    return f"{' | '.join(times)} | {row['speedup']:.2f}×"


def end_to_end(result: dict[str, Any]) -> list[str]:
    """One line for each picture size."""
    cost = result["cost"]
    limit = cost.get("gemm_gmac_s")
    lines = [
        f"{cost['dtype']}, batch {cost['batch']}{f', GEMM {limit:.0f} Gmac/s' if limit else ''}; {cost['crossover_note']}.",
        "",
        "| px | tokens | original ms (IQR) | converted ms (IQR) | speed-up | Gmac | of the GEMM rate | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in cost["rows"]:
        models = [{unit: row[f"{name}_{unit}"] for unit in ("ms", "gmacs", "peak_mib")} for name in ("original", "converted")]
        macs, memory = (" → ".join(f"{model[unit]:.1f}" for model in models) for unit in ("gmacs", "peak_mib"))
        rates = " → ".join(f"{model['gmacs'] / model['ms'] * 1e3 / limit:.0%}" for model in models) if limit else ""
        size = f"{row['height']}×{row['width']} | {row['tokens']}"
        lines.append(f"| {size} | {timed(row)} | {macs} | {rates} | {memory} |")
    return lines


def exported(result: dict[str, Any]) -> list[str]:
    """One line for each picture size; neither graph uses kernels of ours."""
    errors = ", ".join(f"{name} {error:.0e}" for name, error in result["relative_error"].items())
    made = result["environment"]
    runtime = f"OpenVINO {made['openvino']}" if "openvino" in made else f"onnxruntime {made['onnxruntime']}"
    lines = [
        f"{runtime}, float32, batch 1. Relative error against the models: {errors}.",
        "",
        "| px | original ms (IQR) | converted ms (IQR) | speed-up |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines.append(f"| {row['height']}×{row['width']} | {timed(row)} |")
    return lines


def denoising(result: dict[str, Any]) -> list[str]:
    """One line for each size and model; `geometry` says whether it is the real one."""
    model = result["model"]
    blocks = f"{model['num_layers']} blocks of {model['num_attention_heads'] * model['attention_head_dim']} channels"
    dual = f"{len(model['dual_attention_layers'])} of them dual"
    size = result["geometry"] if result["geometry"] != "shrunken" else "shrunken geometry, so no time of the real model's"
    lines = [
        f"{size}: {blocks}, {dual}; {result['dtype']}, batch {result['batch']} for guidance, {result['text_tokens']} tokens of "
        "text, random weights.",
        "",
        "| px | model | step ms (IQR) | speed-up | peak MiB | run of 28 steps, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    original = {(row["px"], row["compiled"]): row["step_ms"] for row in result["rows"] if row["model"] == "original"}
    for row in result["rows"]:
        named = f"{row['model']}{', compiled' if row['compiled'] else ''}"
        step = f"{row['step_ms']:.0f} ({row['iqr_ms']:.0f})"
        rest = ["" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in (("peak_mib", 0), ("run_s", 1))]
        speedup = f"{original[row['px'], row['compiled']] / row['step_ms']:.2f}×"
        lines.append(f"| {row['px']} | {named} | {step} | {speedup} | {' | '.join(rest)} |")
    return lines


def shown(result: dict[str, Any]) -> list[str]:
    """A result in the way that is its kind's."""
    if "geometry" in result:
        return denoising(result)
    kind = operator if "ceilings" in result else exported if "relative_error" in result else end_to_end
    return kind(result)


def page() -> str:
    """The whole page, Markdown."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/performance.py` from `benchmarks/results/`. Contenders take turns in one process; medians",
        "and interquartile ranges. The floor of an operator's row is the larger of seven passes over a (B, N, C) tensor at this",
        "machine's copy rate and of its multiply-adds at its GEMM rate; a model's multiply-adds a second are given as a share of",
        "the latter, measured in the same run. `aligned` is what a converted model runs: on a CPU that is named with CPU kernels",
        "those that `lineate build` compiles once with a C++20 compiler (scratch, 1 or 2 MiB a thread, does not show as peak),",
        "else `pieces`, plain PyTorch.",
    ]
    missing = []
    for name, (title, command) in WANTED.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            missing.append(f"- {title}: `{command} --out benchmarks/results/{name}.json`")
            continue
        result = json.loads(file.read_text())
        lines += ["", f"## {title}", "", provenance(result), "", *shown(result)]
    if missing:
        lines += ["", "## Unmeasured", "", *missing]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
