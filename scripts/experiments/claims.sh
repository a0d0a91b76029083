#!/usr/bin/env bash
# The paper's claims at the scale of two CPU cores: trains every variant of a small Fashion-MNIST
# model with three seeds, evaluates all, writes the tables and curves of docs/RESULTS.md:
#   bash scripts/experiments/claims.sh
# About 45 minutes on two cores: two runs at a time, one thread each. What is done stays done;
# the same command again goes on. STEPS, SEEDS and OUT make it shorter or longer.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

export STEPS=${STEPS:-600} OUT=${OUT:-results/claims} OMP_NUM_THREADS=1
half=$((STEPS / 2))

train() { # name, seed, flags...
  local run="$1-seed$2" seed=$2
  shift 2
  [ -e "$OUT/$run/done" ] && return
  python train.py --results-dir "$OUT" --run-name "$run" --seed "$seed" --data-path fashion-mnist \
    --model DiT-Ti/8 --max-steps "$STEPS" --global-batch-size 64 --lr 1e-3 --warmup-steps 100 \
    --ema-decay 0.99 --precision fp32 --log-every 40 --ckpt-every "$STEPS" --sample-every 0 \
    "$@" >"$OUT/$run.log" 2>&1 || { tail -n 5 "$OUT/$run.log"; return 1; }
  touch "$OUT/$run/done"
  echo "$(date +%T) trained $run"
}

# A dense model (MLP 4D) for half of the steps costs half as much a step as the MoE it becomes, so
# three quarters of the MoE's steps are left.
upcycled() { # seed
  train dense4 "$1" --rf --num-experts 0 --mlp-ratio 4 --max-steps "$half"
  [ -e "$OUT/upcycled-init$1" ] || python upcycle.py --ckpt "$OUT/dense4-seed$1" \
    --out "$OUT/upcycled-init$1" --num-experts 8 --num-shared-experts 2 --seed "$1" \
    >"$OUT/upcycled-init$1.log" 2>&1
  train upcycled "$1" --rf --init-from "$OUT/upcycled-init$1" --max-steps $((STEPS - half / 2))
}

variant() { # name, seed
  case $1 in
    moe) train moe "$2" --rf ;;                                     # 8E2A, 2 shared, balance 0.005
    dense) train dense "$2" --rf --num-experts 0 --mlp-ratio 10 ;;  # 10D = 2 x 4D + 2D activated
    ddpm) train ddpm "$2" ;;
    noshared) train noshared "$2" --rf --num-shared-experts 0 --mlp-ratio 5 ;;  # 10D activated
    experts*) train "$1" "$2" --rf --num-experts "${1#experts}" ;;
    balance*) train "$1" "$2" --rf --aux-loss-weight "${1#balance}" ;;
    upcycled) upcycled "$2" ;;
  esac
}
export -f train upcycled variant
export half

mkdir -p "$OUT"
variants="moe dense ddpm upcycled noshared experts4 experts16 balance0 balance0.01 balance0.05"
for seed in ${SEEDS:-0 1 2}; do
  for name in $variants; do echo "$name $seed"; done
done | xargs -P 2 -L 1 bash -euo pipefail -c 'variant "$@"' _

# Few steps of a sampler each: 25 network evaluations a sample without guidance.
judge() { # run folder
  local sampler="euler"
  [[ "$1" == */ddpm-* ]] && sampler="ddim"
  [ -e "$1/metrics.json" ] || python evaluate.py --ckpt "$1" --out "$1" --num-samples 1000 \
    --sampler "$sampler" --num-sampling-steps 25 --cfg-scale 1 >>"$1.log" 2>&1
}
export -f judge
env -u OMP_NUM_THREADS python -c "
from pathlib import Path
from evaluation.classifiers import load_classifier
load_classifier('fashion-mnist', Path('results/references'))" # once, not by both at once
ls -d "$OUT"/*-seed*/ | sed 's:/$::' | grep -v dense4 |
  xargs -P 2 -I {} bash -euo pipefail -c 'judge {}'
python scripts/experiments/collect.py claims --results "$OUT"
