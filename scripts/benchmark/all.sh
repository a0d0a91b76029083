#!/usr/bin/env bash
# Make every file of docs/performance/ anew, on a quiet machine: about an hour on two cores.
#   bash scripts/benchmark/all.sh [FLAG ...]    # flags of benchmark.py, such as --threads 2
# transformers' experts take part where requirements-benchmark.txt is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
run() { python scripts/benchmark/benchmark.py "$@"; }
run --models DiT-S/2 --repeats 15 --parts rate,layer,step,sample,memory,traffic \
  --out docs/performance/s2.json "$@"
run --models DiT-S/2 --repeats 7 --parts layer --batch-size 32 --out docs/performance/s2_8192.json "$@"
run --models DiT-S/2 --repeats 7 --parts growth --out docs/performance/s2_growth.json "$@"
run --models DiT-B/2 --repeats 5 --parts layer,step,sample,traffic \
  --out docs/performance/b2.json "$@"
