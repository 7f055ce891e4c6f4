#!/usr/bin/env bash
# Several processes on this machine's CPU, as on several hosts:
#   PROCESSES=2 DEVICES=4 launch/local.sh [--dry-run] --config=... --workdir=...
# Ends with exit code 0 when all processes do; otherwise the others are ended and the code of the
# one that failed is returned. launch/README.md has the variables.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }

PROCESSES=${PROCESSES:-2}
DEVICES=${DEVICES:-1}
GRACE_SECONDS=${GRACE_SECONDS:-120}
need_numbers PROCESSES DEVICES GRACE_SECONDS
((PROCESSES > 0 && DEVICES > 0)) || mend "PROCESSES and DEVICES must be at least 1"

# Below the range that systems hand out by themselves; nothing answers there.
port=$((20000 + RANDOM % 10000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((20000 + RANDOM % 10000)); done

# main, as process $1 of PROCESSES.
command=()
prepare() {
  local number=$1
  shift
  command=(
    env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$PROCESSES"
    "JAX_PROCESS_ID=$number" "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
    python -m corrector_jax.main "$@"
  )
}

if [[ $dry_run ]]; then
  for ((i = 0; i < PROCESSES; i++)); do
    prepare "$i" "$@"
    printf '%s &\n' "$(quoted "${command[@]}")"
  done
  echo wait
  exit
fi

pids=() # of the processes that run, by number
printers=()
tell() {
  if ((${#pids[@]})); then kill -s "$1" "${pids[@]}" 2> /dev/null || true; fi
}
trap 'tell TERM' INT TERM HUP # main saves, and ends with 75

# A group of its own for each process: the terminal's Ctrl-C reaches this script alone, which passes
# it on once. Twice would mean: at once, without saving.
set -m
for ((i = 0; i < PROCESSES; i++)); do
  prepare "$i" "$@"
  exec {output}> >(trap '' INT TERM HUP && exec sed -u "s/^/[$i] /")
  printers+=($!)
  "${command[@]}" < /dev/null >&"$output" 2>&1 &
  pids[i]=$!
  exec {output}>&-
done
set +m

# The worse of two exit codes: 75 and 76 go on when tried again, 2 never does.
rank() {
  case $1 in 0) echo 0 ;; 75) echo 1 ;; 76) echo 2 ;; 2) echo 4 ;; *) echo 3 ;; esac
}
worse() {
  if (($(rank "$1") >= $(rank "$2"))); then echo "$1"; else echo "$2"; fi
}

result=0
ending=""   # whether this script is ending processes: their codes then say nothing
deadline="" # in seconds since the start; what runs then is killed
while ((${#pids[@]})); do
  seen=0
  for i in "${!pids[@]}"; do
    if ! kill -0 "${pids[i]}" 2> /dev/null; then
      code=0
      wait "${pids[i]}" 2> /dev/null || code=$?
      unset "pids[i]"
      if [[ ! $ending && $code != 0 ]]; then
        echo "local.sh: process $i ended with exit code $code" >&2
        seen=$(worse "$seen" "$code")
      fi
    fi
  done
  if [[ $seen != 0 ]]; then
    result=$(worse "$result" "$seen")
    deadline=${deadline:-$((SECONDS + GRACE_SECONDS))}
    if [[ $seen != 75 ]]; then # after a 75 the others are saving: leave them alone
      ending=1
      tell TERM
    fi
  fi
  if [[ $deadline && $SECONDS -ge $deadline ]]; then tell KILL; fi
  sleep 0.1 || true # Ctrl-C ends it too
done
wait "${printers[@]}" || true
exit "$result"
