#!/usr/bin/env bash
# Samplers compared on Fashion-MNIST: steps against quality and time, for the README's model and for
# the same one trained with DDPM; then both trained on to 3,500 steps and drawn from again.
# Writes docs/results/samplers.json and .png; the page is docs/RESULTS.md:
#   bash scripts/experiments/samplers.sh
# About an hour and a quarter on two quiet cores: two runs at a time, one thread each. What is done
# stays done.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

export RF=${RF:-results/fashion} DDPM=${DDPM:-results/fashion-ddpm} OUT=${OUT:-results/samplers}
export NUM_SAMPLES=${NUM_SAMPLES:-500} OMP_NUM_THREADS=1

train() { # run folder, steps, flags...
  [ -e "$1/checkpoints/$(printf %07d "$2").pt" ] && return
  echo "training $1; its log: $1/log.txt"
  python train.py --results-dir "$(dirname "$1")" --run-name "$(basename "$1")" \
    --data-path fashion-mnist --model DiT-Ti/4 --max-steps "$2" --global-batch-size 64 --lr 1e-3 \
    --warmup-steps 100 --ema-decay 0.995 --precision fp32 --log-every 250 --ckpt-every 250 \
    --sample-every 750 "${@:3}" >/dev/null 2>&1
}
both() { # steps, suffix of the run folders
  train "$RF$2" "$1" --rf & rf=$!
  train "$DDPM$2" "$1" & ddpm=$!
  wait $rf; wait $ddpm
}
both 2250 ""

draw() { # checkpoint, sampler, steps, name of the variant ("" = none), flags...
  local out="$OUT/$2-$3$4"
  [ -e "$out/metrics.json" ] || { mkdir -p "$out" && python evaluate.py --ckpt "$1" --sampler "$2" \
    --num-sampling-steps "$3" --num-samples "$NUM_SAMPLES" --out "$out" --cfg-scale 2 "${@:5}" \
    >"$out/log.txt" 2>&1 || { tail -n 5 "$out/log.txt"; return 1; }; }
  echo "$(date +%T) $out"
}
export -f draw
env -u OMP_NUM_THREADS python -c "
from pathlib import Path
from evaluation.classifiers import load_classifier
load_classifier('fashion-mnist', Path('results/references'))" # once, not by both at once
{ # the longest first, so that both cores are busy to the end
  echo "$DDPM ddpm 250 ''"
  for steps in 50 25 10; do echo "$RF heun $steps ''"; done
  for steps in 50 25 10; do echo "$RF euler $steps ''"; done
  for steps in 50 25; do echo "$DDPM ddim $steps ''"; done
  for steps in 20 10; do echo "$DDPM dpm++ $steps ''"; done
  echo "$RF euler 50 -interval --cfg-interval 0.1 0.8"
  echo "$DDPM ddim 50 -interval --cfg-interval 0.1 0.8"
  echo "$RF euler 50 -cfg1 --cfg-scale 1"
  echo "$DDPM ddim 50 -cfg1 --cfg-scale 1"
} | xargs -P 2 -L 1 bash -euo pipefail -c 'draw "$@"' _

for run in "$RF" "$DDPM"; do # the same runs go on, under names of their own
  [ -e "$run-3500" ] || { cp -r "$run" "$run-copy" && mv "$run-copy" "$run-3500"; }
done
both 3500 -3500
{
  echo "$RF-3500 euler 50 -3500"
  echo "$RF-3500 euler 25 -3500"
  echo "$DDPM-3500 ddim 50 -3500"
  echo "$DDPM-3500 dpm++ 20 -3500"
} | xargs -P 2 -L 1 bash -euo pipefail -c 'draw "$@"' _
python scripts/experiments/collect.py samplers --results "$OUT"
