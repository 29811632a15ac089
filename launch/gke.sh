#!/usr/bin/env bash
# Trains as a JobSet on a GKE cluster with TPU node pools:  launch/gke.sh image | submit | logs | delete
# DRY_RUN=1 launch/gke.sh submit   prints what would be submitted.
set -euo pipefail
cd "$(dirname "$0")/.."

export NAME=${NAME:-dreambooth}
export NAMESPACE=${NAMESPACE:-default}
export QUEUE=${QUEUE:-tpu-queue}                            # Kueue's local queue
export IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/dreambooth/dreambooth_jax:latest}
export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}     # tpu-v6e-slice, tpu-v5p-slice, tpu-v4-podslice
export TOPOLOGY=${TOPOLOGY:-2x4}                            # of the slice
export HOSTS=${HOSTS:-2}                                    # 2x4 is two hosts ...
export CHIPS=${CHIPS:-4}                                    # ... of four chips each
export SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}          # one that may read and write the bucket
export MODULE=${MODULE:-train}                              # or "protocol": configs/protocol.py, PHOTOS its data set
case $MODULE in
train) export COMMAND=train IMAGES=instance_images FIELDS='' CONFIG=${CONFIG:-configs/dog.py:sd15} ;;
protocol) export COMMAND=evaluate IMAGES=dataset FIELDS=train. CONFIG=${CONFIG:-configs/protocol.py:sd15} ;;
*) echo "MODULE=$MODULE: expected train or protocol" >&2 && exit 2 ;;
esac
export PHOTOS=${PHOTOS:-gs://my-bucket/photos}
export WORKDIR=${WORKDIR:-gs://my-bucket/$NAME}
export BATCH=${BATCH:-8}                                    # the subject's images a step, over all chips
export FSDP=${FSDP:-8}
export RESTARTS=${RESTARTS:-20}                             # after preemptions
DRY_RUN=${DRY_RUN:-}

run() {
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    [[ -n $DRY_RUN ]] || "$@"
}

# The JobSet with the variables in place: escaped inside quotes, whole numbers elsewhere.
render() {
    python3 - launch/jobset.yaml <<'END'
import json, os, re, sys

def fill(match):
    text = re.sub(r"\$\{(\w+)\}", lambda variable: os.environ[variable[1]], match[0].strip('"'))
    if match[0].startswith('"'):
        return json.dumps(text)
    return text if text.isdecimal() else sys.exit(f"{match[0]} is {text!r}: expected a whole number")

with open(sys.argv[1]) as template:
    print(re.sub(r'"[^"\n]*"|\$\{\w+\}', fill, template.read()), end="")
END
}

image() {
    run docker build -f launch/Dockerfile -t "$IMAGE" .
    run docker push "$IMAGE"
}

submit() {
    if [[ -n $DRY_RUN ]]; then
        render
    else
        render | kubectl apply -f -
    fi
}

logs() {
    run kubectl logs --namespace "$NAMESPACE" --follow --prefix --selector "jobset.sigs.k8s.io/jobset-name=$NAME"
}

delete() {
    run kubectl delete jobset --namespace "$NAMESPACE" "$NAME"
}

case ${1:-} in
image | submit | logs | delete) "$1" ;;
*) sed -n '2,3s/^# //p' "$0" >&2 && exit 2 ;;
esac
