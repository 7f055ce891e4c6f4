#!/usr/bin/env bash
# Trains on a Cloud TPU VM pod, asked for as a queued resource. Preempted, it is asked for again and
# the same command goes on; so --workdir is on gs://.
#   NAME=nq PROJECT=my-project ZONE=us-west4-a TPU_TYPE=v5litepod-16 \
#   TPU_RUNTIME=v2-alpha-tpuv5-lite launch/tpu_pod.sh [--dry-run] \
#     --config=configs/nq.py --workdir=gs://BUCKET/nq
# The workers get the commit that is checked out here. launch/README.md has the variables.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }

need NAME "what the queued resource and its TPU VM are called"
need PROJECT "the Google Cloud project"
need ZONE "the zone, for example us-west4-a"
need TPU_TYPE "the accelerator type, for example v5litepod-16"
need TPU_RUNTIME "the software of the TPU VMs, for example v2-alpha-tpuv5-lite"
read -ra options <<< "${TPU_OPTIONS---spot}"
MAX_RESTARTS=${MAX_RESTARTS:-10}
POLL_SECONDS=${POLL_SECONDS:-60}
GRACE_SECONDS=${GRACE_SECONDS:-120}
need_numbers MAX_RESTARTS POLL_SECONDS GRACE_SECONDS

place=("--project=$PROJECT" "--zone=$ZONE")
# A worker that is gone is noticed, not waited for.
alive=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4)
deletion=(gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet)
archive=${TMPDIR:-/tmp}/$NAME.tar.gz # of the commit that is checked out

create() {
  run gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_RUNTIME" "${options[@]}" --quiet
}

on_all_workers() { # COMMAND: one line for the workers' shell
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all "${alive[@]}" --quiet \
    --command="$1"
}

install() {
  run git -C "$here/.." archive --format=tar.gz --prefix=corrector_jax/ --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:corrector_jax.tar.gz" "${place[@]}" \
      --worker=all --quiet &&
    on_all_workers "tar -xzf corrector_jax.tar.gz && corrector_jax/launch/tpu_install.sh"
}

train() {
  on_all_workers "GRACE_SECONDS=$GRACE_SECONDS corrector_jax/launch/tpu_worker.sh $(quoted "$@")"
}

# Prints the state of the queued resource: NONE where there is none, that of its TPU VM where it
# says ACTIVE of one that is gone, UNKNOWN where Google Cloud did not answer.
state() {
  local found node
  found=$(gcloud compute tpus queued-resources list "${place[@]}" \
    --filter="name ~ /queuedResources/$NAME\$" --format="value(state.state)") || found=UNKNOWN
  if [[ $found == ACTIVE ]]; then
    node=$(gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" --format="value(state)") || node=""
    [[ ! $node =~ ^(PREEMPTED|TERMINATED)$ ]] || found=$node
  fi
  echo "${found:-NONE}"
}

# Installs and trains. Returns main's exit code, or 75 where the pod was taken away meanwhile.
working="" # the process group of the gcloud that runs
work() {
  local next=$((SECONDS + POLL_SECONDS)) now
  set -m
  (install && train "$@") < /dev/null &
  working=$!
  set +m
  while kill -0 "$working" 2> /dev/null; do
    if ((SECONDS >= next)); then
      now=$(state)
      if [[ ! $now =~ ^(ACTIVE|UNKNOWN)$ ]]; then
        say "$NAME is $now: leaving it"
        kill -- "-$working" 2> /dev/null || true
        wait "$working" 2> /dev/null || true
        working=""
        return 75
      fi
      next=$((SECONDS + POLL_SECONDS))
    fi
    sleep 0.2
  done
  local code=0
  wait "$working" || code=$?
  working=""
  return "$code"
}

say() {
  printf 'tpu_pod.sh: %s\n' "$*" >&2
}

finish() { # CODE
  if [[ ${TPU_KEEP:-} ]]; then
    say "$NAME stays, and is paid for, until: $(quoted "${deletion[@]}")"
  else
    run "${deletion[@]}"
  fi
  exit "$1"
}

interrupted() { # CODE
  [[ ! $working ]] || kill -- "-$working" 2> /dev/null || true
  say "the pod was left as it is: the same command goes on with it; to end it:" \
    "$(quoted "${deletion[@]}")"
  exit "$1"
}

if [[ $dry_run ]]; then
  create
  echo "# as soon as it is ACTIVE:"
  install
  train "$@"
  echo "# SUSPENDED, PREEMPTED, TERMINATED or FAILED: this, and all of it again; at the end too:"
  run "${deletion[@]}"
  exit
fi

git -C "$here/.." diff --quiet HEAD ||
  say "what is not committed does not reach the workers: they get $(git -C "$here/.." rev-parse --short HEAD)"
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP
restarts=0
failed() { # CODE
  [[ $1 != 2 ]] || finish 2
  restarts=$((restarts + 1))
  say "failed ($1): $restarts of at most $MAX_RESTARTS restarts"
  ((restarts <= MAX_RESTARTS)) || finish "$1"
}

before=""
while true; do
  now=$(state)
  [[ $now == "$before" ]] || say "$NAME is $now"
  case $now in
    NONE)
      if ! create; then
        [[ $before ]] || exit 1 # the first request: there is something to mend
        failed 1
      fi
      ;;
    ACTIVE)
      code=0
      work "$@" || code=$?
      case $code in
        0) finish 0 ;;
        75) say "stopped (75): the same command goes on" ;;
        *)
          sleep "$POLL_SECONDS" # a pod that was taken away says so by now, and did not fail
          [[ ! $(state) =~ ^(ACTIVE|UNKNOWN)$ ]] || failed "$code"
          ;;
      esac
      ;;
    SUSPENDED | PREEMPTED | TERMINATED) run "${deletion[@]}" || failed 1 ;;
    FAILED)
      failed 1
      run "${deletion[@]}" || true
      ;;
  esac
  before=$now
  sleep "$POLL_SECONDS"
done
