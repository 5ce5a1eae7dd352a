#!/bin/bash
# Pre-training on several machines of a Slurm cluster: sbatch examples/accelerate/slurm.sh my.yaml outputs/mine
#
# One launcher per machine, one process per GPU. After MAX_HOURS, half an hour before the time limit, the run writes a
# checkpoint and stops; the job then goes back into the queue and resumes from it. The same on SIGTERM, two minutes before
# the limit, if that takes less than the 30 s for which launchers wait.
#SBATCH --job-name=t3d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

CONFIG=$1
OUTPUT=$2
STRATEGY=${STRATEGY:-ddp}
MAX_HOURS=${MAX_HOURS:-23.5}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NUM_PROCESSES=$((SLURM_NNODES * GPUS_PER_NODE))
export CONFIG OUTPUT STRATEGY MAX_HOURS
# What a former job left says nothing about this one.
rm -f "$OUTPUT/status.json"

# The launcher's exit status hides that of the trainer, which is in status.json.
srun bash -c 'accelerate launch \
    --config_file "examples/accelerate/$STRATEGY.yaml" \
    --num_machines "$SLURM_NNODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    examples/pretrain.py --config "$CONFIG" --resume --max-hours "$MAX_HOURS" \
    training.output_dir="$OUTPUT" training.num_processes="$NUM_PROCESSES" training.strategy="$STRATEGY"' || true

if grep -q '"status": "interrupted"' "$OUTPUT/status.json"; then
    scontrol requeue "$SLURM_JOB_ID"
else
    grep -q '"status": "completed"' "$OUTPUT/status.json"
fi
