#!/usr/bin/env bash
# All that waits for a GPU, in one command: correctness on CUDA, then latency against resolution, then the whole demo there.
#   make demo && PATH=.venv/bin:$PATH benchmarks/gpu.sh
# Results go to benchmarks/results/gpu-*.json and runs/gpu-demo; commit the former with the device's name, which they hold.
set -eu
cd "$(dirname "$0")/.."
python -m pytest tests/test_cuda.py
for preset in t5 t5-plus linear; do
  lineate bench embedded --preset "$preset" --device cuda --sizes 224,448,672,1022,1442,2044 --out "benchmarks/results/gpu-$preset.json" --overwrite
done
sweep="python benchmarks/ops.py --device cuda --dtype bfloat16 --batch 2 --heads 24 --loss l2"
$sweep --tokens 1024,4096,16384,65536 --skip "sdpa math" --out benchmarks/results/gpu-ops.json
$sweep --tokens 1024,4096,16384 --skip "sdpa math" --backward --out benchmarks/results/gpu-ops-backward.json
lineate demo --device cuda --out runs/gpu-demo --overwrite
