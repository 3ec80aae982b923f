#!/usr/bin/env bash
# Train on one or several machines with Slurm; from the repository's folder, after ./run.sh --help has installed .venv:
#     sbatch docs/slurm.sh --track gpt2-small
#     RUN_DIR=runs/mine sbatch --nodes=1 --time=00:30:00 docs/slurm.sh --track gpt2-small --seed 1
# Before its time is over the job saves, and queues itself again to go on from there.
#SBATCH --job-name=stopwatch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=stopwatch-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

run_dir=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}  # the same whenever the job starts; all machines have to see it
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would end scontrol by SIGPIPE
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # docs/clusters.md says why
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus | wc -l)}

srun .venv/bin/python -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    train_gpt.py "$@" --run-dir "$run_dir" --resume auto &
training=$! stopped='' again=yes
trap 'stopped=yes again=yes; kill -TERM "$training"' TERM  # srun passes it on to every machine

status=0
while [[ -n $again ]]; do  # a signal ends wait, not what it waits for
    again=''
    wait "$training" && status=0 || status=$?
done
[[ -z $stopped || $status == 0 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
