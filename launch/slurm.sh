#!/usr/bin/env bash
# Submits training on GPU nodes of a SLURM cluster, one process a node. Preempted, or out of time, the
# job saves, is queued again and goes on. From the folder and the environment that training needs:
#   NODES=4 GPUS=8 launch/slurm.sh [--dry-run] --config=... --workdir=...
# sbatch takes what else the cluster asks for from its own variables, such as SBATCH_PARTITION.
# launch/README.md has the variables.
set -euo pipefail
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) # SLURM runs a copy of slurm_job.sh elsewhere
# shellcheck source=launch/commands.sh
source "$LAUNCH/commands.sh"
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }

need NODES "the number of nodes"
need GPUS "the number of GPUs of each node"
NAME=${NAME:-corrector_jax}
CPUS=${CPUS:-$((8 * GPUS))}
GRACE_SECONDS=${GRACE_SECONDS:-120}
MAX_RESTARTS=${MAX_RESTARTS:-10}
need_numbers NODES GPUS CPUS GRACE_SECONDS MAX_RESTARTS
export LAUNCH GPUS CPUS MAX_RESTARTS

# The signal goes to the processes of main, GRACE_SECONDS before the time is over: not with "B:",
# which is for the batch script alone. srun would pass a SIGTERM of its own on as SIGKILL.
run sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node=1 --gpus-per-node="$GPUS" \
  --cpus-per-task="$CPUS" --requeue --open-mode=append --signal="TERM@$GRACE_SECONDS" --export=ALL \
  "$LAUNCH/slurm_job.sh" "$@"
if [[ $dry_run ]]; then
  echo "# in the job:"
  "$LAUNCH/slurm_job.sh" --dry-run "$@"
fi
