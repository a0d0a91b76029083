#!/usr/bin/env bash
# Measure everything that docs/PERFORMANCE.md aims at, on a quiet machine: some 15 minutes on two cores.
#   bash scripts/benchmark/all.sh [FLAG ...]    # flags of benchmark.py, such as --threads 2
#   bash scripts/benchmark/all.sh --publish     # then: files to docs/performance/, tables to the page
# Stopped, it goes on with the file it was at; rm -r results/benchmark starts anew. transformers' experts
# take part where requirements-benchmark.txt is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${BENCHMARK_FOLDER:-results/benchmark}
summary() { python scripts/benchmark/summary.py "$folder" "$@"; }
[ "${1:-}" != --publish ] || { summary --publish docs; exit; }
mkdir -p "$folder"
flags=("$@")
run() {  # NAME REPEATS FLAG ...
  [ -e "$folder/$1.json" ] || python scripts/benchmark/benchmark.py --repeats "$2" \
    --out "$folder/$1.json" "${@:3}" ${flags[@]+"${flags[@]}"}
}
bf16=bf16
grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo || bf16=fp32  # elsewhere it is emulated, 100 times as slow
run s2_traffic 1 --models DiT-S/2 --parts traffic
run s2_layer 15 --models DiT-S/2 --parts layer
run s2_layer_8192 7 --models DiT-S/2 --parts layer --batch-size 32 --dtypes $bf16
run s2_ends 7 --models DiT-S/2 --parts ends --dtypes fp32
run s2_state 15 --models DiT-S/2 --parts state
run s2_step 5 --models DiT-S/2 --parts step
run b2_step 3 --models DiT-B/2 --parts step --dtypes $bf16
run families 5 --models DiT-S/2 --parts families
summary
