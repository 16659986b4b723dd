#!/usr/bin/env bash
# The whole pipeline on a SLURM cluster: sbatch scripts/slurm.sh
# The numbers here are those of the profile paper: as many nodes as engine.machines, as many GPUs on each as engine.processes.
# With machines: 8 in the profile, sbatch --nodes=8 scripts/slurm.sh. Training refuses a job of another number of nodes.
# Stages run on the first node; those that train start torchrun on all of them (workbook/runs.py).
#SBATCH --job-name=sit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" # on a file system that all nodes share
source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # head would end the pipe early
export MASTER_ADDR MASTER_PORT=29400
export OMP_NUM_THREADS=8
PROFILE=${PROFILE:-paper}

# Before nodes are kept for hours: is this a job of as many as the profile says?
python -m workbook.preflight "$PROFILE"
# DVC marks what it works on with the number of its process, which on another node belongs to someone else.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then rm -f .dvc/tmp/rwlock; fi

# A job whose time ends before training does (USR1; scancel sends TERM) is put back into the queue and goes on from its last checkpoint.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
python -m dvc exp run --set-param profile="$PROFILE" "$@" &
wait $!
