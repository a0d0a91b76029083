#!/usr/bin/env bash
# Train DiT-B/2-8E2A on an image folder with DDP: DATA=/path/to/imagenet/train bash scripts/train_b.sh
# RECIPE=promoe (or another of config/recipes/) trains that mixture instead of the paper's.
# Several nodes: also set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each. Flags pass through.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MIXTURE=(--num-experts 8 --num-experts-per-tok 2 --rf)
[[ -z "${RECIPE:-}" ]] || MIXTURE=(--config "config/recipes/$RECIPE.yaml")

torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-localhost}" --master_port="${MASTER_PORT:-29500}" \
  --nproc_per_node="${GPUS:-8}" \
  train.py --model DiT-B/2 "${MIXTURE[@]}" \
  --data-path "${DATA:?set DATA to the folder of training images, one folder a class}" \
  --image-size 256 --global-batch-size 1024 "$@"
