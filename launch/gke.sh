#!/usr/bin/env bash
# Submits training on a TPU slice of a GKE cluster as a JobSet, which restarts all of its pods when
# one is lost; so --workdir is on gs://. kubectl's current context says which cluster.
#   NAME=nq IMAGE=... TPU_ACCELERATOR=tpu-v5-lite-podslice TPU_TOPOLOGY=4x4 CHIPS=4 \
#   launch/gke.sh [--dry-run] --config=configs/nq.py --workdir=gs://BUCKET/nq
# launch/README.md has the variables, and how the image is made.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
source "$here/commands.sh"
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }

need NAME "what the JobSet is called"
need IMAGE "the container image with this project"
need TPU_ACCELERATOR "the cluster's label of the TPU, for example tpu-v5-lite-podslice"
need TPU_TOPOLOGY "the chips of the slice, for example 4x4"
need CHIPS "the number of chips of each host of the slice, for example 4"
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
GRACE_SECONDS=${GRACE_SECONDS:-120}
MAX_RESTARTS=${MAX_RESTARTS:-50}
need_numbers CHIPS GRACE_SECONDS MAX_RESTARTS
[[ $TPU_TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] ||
  mend "TPU_TOPOLOGY is ${TPU_TOPOLOGY@Q}: write numbers joined by x, for example 4x4"
total=$((${TPU_TOPOLOGY//x/*}))
((CHIPS > 0 && total % CHIPS == 0)) ||
  mend "CHIPS is $CHIPS: the $total chips of TPU_TOPOLOGY cannot be shared by hosts of so many"

# A JSON list is a YAML one. Kubernetes reads "$(X)" in it as a variable, and "$$" as "$".
ARGS="["
for argument; do
  argument=${argument//\$/\$\$}
  argument=${argument//\\/\\\\}
  argument=${argument//\"/\\\"}
  argument=${argument//$'\n'/\\n}
  argument=${argument//$'\t'/\\t}
  [[ $ARGS == "[" ]] || ARGS+=", "
  ARGS+="\"$argument\""
done
ARGS+="]"

manifest=$(< "$here/gke.yaml")
fill() { # VARIABLE VALUE
  manifest=${manifest//"\${$1}"/"$2"}
}
fill NAME "$NAME"
fill IMAGE "$IMAGE"
fill TPU_ACCELERATOR "$TPU_ACCELERATOR"
fill TPU_TOPOLOGY "$TPU_TOPOLOGY"
fill CHIPS "$CHIPS"
fill HOSTS "$((total / CHIPS))"
fill SERVICE_ACCOUNT "$SERVICE_ACCOUNT"
fill GRACE_SECONDS "$GRACE_SECONDS"
fill MAX_RESTARTS "$MAX_RESTARTS"
fill ARGS "$ARGS" # last: what the arguments say is not filled in

if [[ $dry_run ]]; then
  printf '%s\n' "kubectl create --filename=- << 'END OF JOBSET'" "$manifest" "END OF JOBSET"
else
  kubectl create --filename=- <<< "$manifest"
  cat >&2 << HINTS
follow:  kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0
state:   kubectl get jobset $NAME
end:     kubectl delete jobset $NAME
HINTS
fi
