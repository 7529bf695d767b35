#!/usr/bin/env bash
# A federation of several nodes under Slurm: sbatch deploy/slurm.sh with num_rounds=100 checkpoints_dir=...
# See docs/clusters.md. %n in an argument is the number of the node, from 0, for settings that differ:
# sbatch deploy/slurm.sh with nodes/%n.json ...
#SBATCH --job-name=federation
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --output=federation-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# A requeued job may get other nodes.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) RANKS=${RANKS:-1}
# If the nodes' names do not resolve to the network between them:
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# A minute before the time limit Slurm sends USR1: the ranks get SIGTERM and end, and the job goes back into the queue
# and resumes from the last checkpoint. SIGTERM itself, which scancel sends, ends the job.
time_is_up=no
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One torchrun on each node; if one fails, Slurm ends the others.
# shellcheck disable=SC2016 # the node expands the variables
srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/python -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  scripts/train_federated.py "${@//%n/$SLURM_NODEID}"' federation "$@" &
ranks=$!

status=0
wait "$ranks" || status=$?
if [[ $time_is_up = yes ]]; then
  wait "$ranks" || true # the signal interrupted the first wait
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
