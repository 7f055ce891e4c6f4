#!/usr/bin/env bash
# The job that slurm.sh submits, on the first of its nodes.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$LAUNCH/commands.sh"
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }
job=${SLURM_JOB_ID:-JOB}

# By itself jax takes one GPU for each task: here a task has all of its node.
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((GPUS - 1)))
export JAX_LOCAL_DEVICE_IDS
[[ ! $dry_run ]] || echo "export JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS"

# A process that fails ends the others by itself (76). They are given an hour, for when one of them
# has finished and another is still writing the report.
code=0
run srun --kill-on-bad-exit=0 --wait=3600 --label --cpus-per-task="$CPUS" \
  python -m corrector_jax.main "$@" || code=$?

if [[ $dry_run ]]; then
  echo "# exit code 75, or any but 0 and 2 within $MAX_RESTARTS restarts:"
  run scontrol requeue "$job"
  exit
fi
case $code in
  0 | 2) exit "$code" ;;
  75) ;;
  *) ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || exit "$code" ;;
esac
echo "slurm_job.sh: ended with exit code $code: queued again" >&2
run scontrol requeue "$job"
