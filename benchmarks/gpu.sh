#!/usr/bin/env bash
# All that waits for a GPU, in one command and less than ten minutes on one: is it right, what does the operator cost, what do
# whole models cost.
#   make demo && PATH=.venv/bin:$PATH benchmarks/gpu.sh
# A part that fails or takes too long says so, and the next one runs; at the end the failed ones are named and the status is 1.
# Results go to benchmarks/results/gpu-*.json and sd35-time-cuda.json; commit them, they hold the device's name.
set -u
cd "$(dirname "$0")/.."
failed=()

part() { # name, seconds at most, command
  local name=$1 limit=$2 status=0
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  timeout "$limit" "$@" || status=$?
  if [ "$status" -ne 0 ]; then
    printf 'FAILED: %s, status %s (124: more than %s s)\n' "$name" "$status" "$limit" >&2
    failed+=("$name")
  fi
}

bench() { # name, source, preset, sizes
  part "$1" 55 lineate bench "$2" --preset "$3" --sizes "$4" --precision bf16 --device cuda \
    --out "benchmarks/results/gpu-$1.json" --overwrite
}

if ! nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv; then
  echo 'error: no NVIDIA GPU here that nvidia-smi can show' >&2
  exit 1
fi
part correctness 150 python -m pytest -q tests/test_cuda.py tests/kernels/test_kernels.py
sweep="python benchmarks/ops.py --device cuda --dtype bfloat16 --batch 2 --heads 24 --loss l2 --seconds 4"
part operator 90 $sweep --tokens 1024,4096,16384,65536 --skip "sdpa math" --out benchmarks/results/gpu-ops.json
part operator-backward 70 $sweep --tokens 1024,4096,16384 --skip "sdpa math" --backward --out benchmarks/results/gpu-ops-backward.json
part sd35 120 python benchmarks/sd35.py time --sizes 1024,2048 --repeats 3
bench deit-s timm:deit_small_patch16_224 t5 224,512,1024
bench dinov2-s embedded t5 224,448,1022,2044
bench dit-xl dit:DiT-XL/2 dit5 32,64,128,256
if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}" >&2
  exit 1
fi
