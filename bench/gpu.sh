#!/usr/bin/env bash
# The benchmark on a CUDA machine: draws a model of Qwen3-4B's shape, in 8 bits, once, and serves it.
#   usage: bench/gpu.sh OUT_DIR [SUITE] [SECONDS]     from the repository's root
# PYTHON (default python3) must have mlx[cuda13], mlx-lm and what penstock itself needs. No round starts after
# SECONDS (default 380); what was measured until then is in OUT_DIR/SUITE.json and OUT_DIR/SUITE.md.
set -euo pipefail
out=$1 suite=${2:-gpu} seconds=${3:-380}
python=${PYTHON:-python3}
model=${BENCH_MODEL:-/tmp/penstock-bench/qwen3-4b}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" "$model"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
began=$SECONDS
"$python" -m bench.models "${BENCH_SHAPE:-qwen3-4b}" "$model" --dtype bfloat16
echo "model: $(du -sh "$model" | cut -f1) in $((SECONDS - began)) s"
"$python" -m bench.serve --suite "$suite" --gpu --model-dir "$model" --deadline "$seconds" \
  --out "$out/$suite.json" 2>&1 | tee "$out/$suite.md"
