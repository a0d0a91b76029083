#!/usr/bin/env bash
# Which mixture beats a dense model of equal activation: trains and judges every variant of
# scripts/experiments/recipes.py, the most telling first, and writes docs/RECIPES.md anew after each:
#   bash scripts/experiments/recipes.sh
# A run takes 8 to 15 minutes of one thread (the wide dense model 20 to 30), all about a night of two
# cores. The values of a run are in docs/results/recipes as soon as it ends; what is done stays done
# and what was cut off goes on. JOBS (2) runs at a time, one thread each; the same command in another
# shell adds as many. SEEDS, STEPS, OUT and DOCS make it another experiment.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

export STEPS=${STEPS:-2000} OUT=${OUT:-results/recipes} DOCS=${DOCS:-docs/results/recipes}
mkdir -p "$OUT" "$DOCS"
python -c "
from pathlib import Path
from evaluation.classifiers import load_classifier
load_classifier('fashion-mnist', Path('results/references'))" # once, not by both at once

export OMP_NUM_THREADS=1
one() { # variant, seed
  python scripts/experiments/recipes.py run "$1" "$2" --steps "$STEPS" --results "$OUT" --docs "$DOCS"
}
export -f one
# shellcheck disable=SC2086
python scripts/experiments/recipes.py list --seeds ${SEEDS:-0 1 2} |
  xargs -P "${JOBS:-2}" -L 1 bash -euo pipefail -c 'one "$@"' _ || true # what failed has its log
python scripts/experiments/recipes.py page --docs "$DOCS"
