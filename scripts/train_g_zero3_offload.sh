#!/usr/bin/env bash
# Train DiT-G/2-16E2A with ZeRO-3, its state in host memory. DATA is the folder of images:
#   DATA=/path/to/imagenet/train bash scripts/train_g_zero3_offload.sh
# RECIPE=promoe (or another of config/recipes/) trains that mixture instead of the paper's.
# Several nodes: also set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each. Flags pass through.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MIXTURE=(--num-experts 16 --num-experts-per-tok 2 --rf)
[[ -z "${RECIPE:-}" ]] || MIXTURE=(--config "config/recipes/$RECIPE.yaml")

torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-localhost}" --master_port="${MASTER_PORT:-29500}" \
  --nproc_per_node="${GPUS:-8}" \
  train_deepspeed.py --deepspeed-config config/zero3_offload.json \
  --model DiT-G/2 "${MIXTURE[@]}" \
  --data-path "${DATA:?set DATA to the folder of training images, one folder a class}" \
  --image-size 256 --global-batch-size 1024 --micro-batch-size 8 --grad-checkpointing "$@"
