"""A model and its conversion as ONNX graphs on the CPU, under onnxruntime or OpenVINO: latency by picture size, taking turns.

    python benchmarks/exported.py                                       the embedded ViT-S/14 and t5: results/exported.json
    python benchmarks/exported.py --preset t5-2layer --sizes 224,518 --out exported-2layer.json
    python benchmarks/exported.py --runtime openvino                    after pip install openvino: results/exported-openvino.json

Both graphs are written by `lineate.export`, which checks them against the models first. Weights matter to no timing:
where the embedded model is not installed, timm's architecture stands in with random ones, and the result says so. A minute or
two for the graphs and as much for the timings, on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from lineate import runs
from lineate.embedded import EmbeddedModelError
from lineate.export import export
from lineate.linearize import Pair, load_pair
from lineate.settings import parse_sizes, read_settings

RESULTS = Path(__file__).parent / "results"
STAND_IN = "timm:vit_small_patch14_dinov2"


def pair(preset: str) -> Pair:
    conversion = read_settings(preset_name=preset).conversion
    try:
        return load_pair("embedded", conversion)
    except EmbeddedModelError as error:
        print(f"{error}; timing {STAND_IN} with random weights")
        return load_pair(STAND_IN, conversion, scratch=0)


Graph = Callable[[numpy.ndarray], numpy.ndarray]


def by_onnxruntime(file: Path, threads: int) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {"pixel_values": pictures})[0]


def by_openvino(file: Path, threads: int) -> Graph:
    import openvino

    wanted = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}  # half where the CPU has it, otherwise
    compiled = openvino.Core().compile_model(str(file), "CPU", wanted)
    return lambda pictures: compiled([pictures])[0]


RUNTIMES = {"onnxruntime": by_onnxruntime, "openvino": by_openvino}


def timings(graphs: dict[str, Graph], size: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Medians in ms after one untimed pass, the graphs taking turns."""
    pictures = numpy.random.default_rng(0).standard_normal((1, 3, *size), dtype=numpy.float32)
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats + 1):
        for name, run in graphs.items():
            start = time.perf_counter()
            run(pictures)
            if turn:
                found[name].append((time.perf_counter() - start) * 1e3)
    row: dict[str, Any] = {"height": size[0], "width": size[1], "repeats": repeats}
    for name, times in found.items():
        low, median, high = numpy.quantile(times, (0.25, 0.5, 0.75))
        row |= {f"{name}_ms": float(median), f"{name}_iqr_ms": float(high - low)}
    return row | {"speedup": row["original_ms"] / row["converted_ms"]}


def off(found: Graph, expected: Graph) -> float:
    """How far an answer is from another's, relative, in the norm over all numbers."""
    pictures = numpy.random.default_rng(0).standard_normal((1, 3, 224, 280), dtype=numpy.float32)
    right = expected(pictures)
    return float(numpy.linalg.norm(found(pictures) - right) / numpy.linalg.norm(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    parser.add_argument("--preset", default="t5")
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("224,518,742,1022"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="default: results/exported.json, or exported-RUNTIME.json of another runtime")
    args = parser.parse_args()
    try:
        versions = {args.runtime: importlib.metadata.version(args.runtime), "threads": args.threads}
    except importlib.metadata.PackageNotFoundError:
        parser.error(f"{args.runtime} is not installed: pip install {args.runtime}")
    out = args.out or RESULTS / ("exported.json" if args.runtime == "onnxruntime" else f"exported-{args.runtime}.json")
    models = pair(args.preset)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("original", "converted")}
        agreement = {name: max(row.error for row in export(getattr(models, name), file)) for name, file in files.items()}
        graphs = {name: RUNTIMES[args.runtime](file, args.threads) for name, file in files.items()}
        if args.runtime != "onnxruntime":  # by which the graphs were checked
            checked = {name: by_onnxruntime(file, args.threads) for name, file in files.items()}
            agreement = {name: error + off(graphs[name], checked[name]) for name, error in agreement.items()}
        print(*(f"{name} off by {error:.1e}" for name, error in agreement.items()), flush=True)
        rows = []
        for size in args.sizes:
            rows.append(timings(graphs, size, args.repeats))
            print(*(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    command = ["benchmarks/exported.py", *runs.command_line()[1:]]
    about = {"source": models.source.name, "preset": args.preset, "command": command, "created": runs.now()}
    environment = runs.environment(torch.device("cpu")) | versions
    runs.write_json(out, about | {"relative_error": agreement, "rows": rows, "environment": environment})


if __name__ == "__main__":
    main()
