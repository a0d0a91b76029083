#!/usr/bin/env bash
#SBATCH --job-name=dit-moe-g
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@600
#SBATCH --output=%x-%j.log
# Example: train DiT-G/2-16E2A on 4 nodes of 8 GPUs under SLURM, from the repository's folder:
#   DATA=/path/to/imagenet/train sbatch scripts/slurm_g_zero3.sh
# The folders of the data and of results/ must be shared by the nodes. A requeued job continues.
# Ten minutes before the end of its time a job saves and ends with 0; submitted several times with
# --dependency=singleton, the next one goes on.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}" NNODES="$SLURM_NNODES" GPUS=8
export DATA="${DATA:?set DATA to the folder of training images, one folder a class}"
# srun does not inherit --cpus-per-task (since 22.05): a node's ranks would share one core.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# shellcheck disable=SC2016  # SLURM_NODEID differs from node to node
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1  # for the ranks, not for their launcher
  NODE_RANK=$SLURM_NODEID bash scripts/train_g_zero3.sh "$@"' \
  train_g "$@"
