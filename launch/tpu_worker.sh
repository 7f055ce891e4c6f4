#!/usr/bin/env bash
# On a TPU VM: ends what an earlier connection left running (it saves), then runs main.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=.main.pid

# Whether the process that was started here last still runs; not another with its number.
runs() {
  [[ -e $started ]] && grep --quiet --text corrector_jax.main "/proc/$(< "$started")/cmdline" 2> /dev/null
}

if runs; then
  kill -TERM "$(< "$started")" || true
  for ((i = 0; i < GRACE_SECONDS; i++)); do
    runs || break
    sleep 1
  done
  if runs; then kill -KILL "$(< "$started")"; fi
fi

echo $$ > "$started"
# shellcheck source=/dev/null
source .venv/bin/activate
exec python -m corrector_jax.main "$@"
