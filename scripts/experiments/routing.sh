#!/usr/bin/env bash
# Regenerate the figures and tables of docs/ROUTING.md from a checkpoint; flags go to expert_data.py:
#   CKPT=results/fashion bash scripts/experiments/routing.sh --num-per-class 50
# About 10 minutes on two CPU cores for the small Fashion-MNIST model. Runs that are done stay.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

ckpt=${CKPT:-results/fashion}
work=${WORK:-results/routing}
docs=${DOCS:-docs/routing}

python expert_data.py --ckpt "$ckpt" --out "$work/samples.npz" "$@"
python expert_data.py --ckpt "$ckpt" --out "$work/real.npz" --real \
  --times 1 0.9 0.8 0.7 0.6 0.5 0.4 0.3 0.2 0.1 0.02 "$@"

python heatmap_class.py --data "$work/samples.npz" --order similarity --out "$docs/class.png"
for by in expert patch map step pair; do
  python heatmap_layer.py --data "$work/samples.npz" --by "$by" --out "$docs/$by.png"
done
python heatmap_layer.py --data "$work/samples.npz" --by sample --sample 9 --num-columns 6 \
  --dpi 75 --out "$docs/sample.png"
python heatmap_layer.py --data "$work/real.npz" --by step --out "$docs/real_step.png"
cp "$work/samples.csv" "$docs/samples.csv"
cp "$work/real.csv" "$docs/real.csv"
python expert_report.py --data "$work/samples.npz" --out "$work/report.html"
