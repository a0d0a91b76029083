#!/usr/bin/env bash
# Samplers compared on Fashion-MNIST: steps against quality and time, for the README's model and for
# the same one trained with DDPM. Writes docs/results/samplers.json; the page is docs/RESULTS.md:
#   bash scripts/experiments/samplers.sh
# About 30 minutes on two CPU cores, 12 of them for the DDPM model. What is done stays done.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

rf=${RF:-results/fashion} ddpm=${DDPM:-results/fashion-ddpm} out=${OUT:-results/samplers}
n=${NUM_SAMPLES:-1000}

train() { # run name, flags...
  python train.py --run-name "$1" --data-path fashion-mnist --model DiT-Ti/4 --max-steps 2250 \
    --global-batch-size 64 --lr 1e-3 --warmup-steps 100 --ema-decay 0.995 --precision fp32 \
    --log-every 250 --ckpt-every 250 --sample-every 750 "${@:2}"
}
[ -e "$rf/checkpoints/0002250.pt" ] || train "$(basename "$rf")" --rf
[ -e "$ddpm/checkpoints/0002250.pt" ] || train "$(basename "$ddpm")"

draw() { # checkpoint, sampler, steps, name of the variant, flags...
  [ -e "$out/$2-$3$4/metrics.json" ] || python evaluate.py --ckpt "$1" --sampler "$2" \
    --num-sampling-steps "$3" --num-samples "$n" --out "$out/$2-$3$4" --cfg-scale 2 "${@:5}"
}
for steps in 50 25 10; do
  draw "$rf" euler $steps ""
  draw "$rf" heun $steps ""
done
draw "$rf" euler 50 -interval --cfg-interval 0.1 0.8
draw "$rf" euler 50 -cfg1 --cfg-scale 1
draw "$ddpm" ddpm 250 ""
draw "$ddpm" ddim 50 ""
draw "$ddpm" ddim 25 ""
draw "$ddpm" dpm++ 20 ""
draw "$ddpm" dpm++ 10 ""
draw "$ddpm" ddim 50 -interval --cfg-interval 0.1 0.8
draw "$ddpm" ddim 50 -cfg1 --cfg-scale 1
python scripts/experiments/collect.py samplers --results "$out"
