#!/usr/bin/env bash
# Make every picture of README and docs/ again, and the tables beside them: a night and a half of two
# CPU cores, or minutes where the runs are there, since what is done stays done:
#   bash scripts/figures.sh            # all of them
#   bash scripts/figures.sh --list     # which picture is made by what
# An experiment alone: its own script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

makers=( # pictures, and what makes them
  "docs/fashion_mnist.png          scripts/experiments/fashion.sh"
  "docs/routing/*.png              scripts/experiments/routing.sh"
  "docs/results/samplers*.png      scripts/experiments/samplers.sh"
  "docs/results/claims*.png        scripts/experiments/claims.sh"
  "docs/results/cache.png          scripts/experiments/cache.sh"
  "docs/results/recipes*.png       scripts/experiments/recipes.sh"
  "docs/results/recipes/*.png      scripts/experiments/recipes.sh"
)
for maker in "${makers[@]}"; do
  read -r pictures script <<<"$maker"
  if [ "${1:-}" = --list ]; then
    echo "$pictures $script"
  else
    echo "$pictures: bash $script"
    bash "$script"
  fi
done
