#!/usr/bin/env bash
# The variables of tpu_vm.sh and queued.sh, and the steps that both take. Set them in the environment or here. Steps
# return what failed themselves: `set -e` does not hold where they stand in a condition.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-dreambooth}                  # of the slice, and of the run
TYPE=${TYPE:-v5litepod-8}                 # slice: v5litepod-1 to -256, v6e-1 to -256, v5p-8, v4-8, ...
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}       # runtime version: v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base for v4
SPOT=${SPOT:-1}                           # 1: cheaper, may be taken away at any time; empty: on demand
WORKDIR=${WORKDIR:-gs://my-bucket/$NAME}  # one place for all hosts: checkpoints, class images, samples
PHOTOS=${PHOTOS:-examples/subjects/dog}   # three to five pictures, copied to every host
RESULTS=${RESULTS:-results/$NAME}         # where fetch brings samples, metrics and trained weights to
CONFIG=${CONFIG:-configs/dog.py:sd15}
ARGS=${ARGS:---config.batch_size=8 --config.mesh_fsdp=8}  # more --config.FIELD=VALUE
POLL=${POLL:-20}                          # seconds between two looks at the state of a slice
DRY_RUN=${DRY_RUN:-}                      # 1: print the commands instead of running them

where=(--project="$PROJECT" --zone="$ZONE")
# shellcheck disable=SC2034 # used by the scripts that source this one
spot=(${SPOT:+--spot})

run() {
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    [[ -n $DRY_RUN ]] || "$@"
}

on_all_hosts() {
    run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

# The package, the configs and the photos to every host, and what they need into an environment of its own.
install() {
    local archive
    archive=$(mktemp -d)/job.tgz
    run tar -czf "$archive" --exclude=__pycache__ setup.py dreambooth_jax configs -C "$(dirname "$PHOTOS")" \
        --transform="s,^$(basename "$PHOTOS"),photos," "$(basename "$PHOTOS")" || return
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:job.tgz" "${where[@]}" --worker=all || return
    on_all_hosts "mkdir -p job && tar -xzf job.tgz -C job && cd job &&
        python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.11 env &&
        python3 -m uv pip install -q --python env -e '.[tpu]'"
}

# The same command on every host; it goes on from the last checkpoint in WORKDIR.
train() {
    on_all_hosts "cd job && env/bin/python -m dreambooth_jax.train --config $CONFIG --config.workdir=$WORKDIR \
        --config.instance_images=photos $ARGS"
}

# Everything but the optimizer's state, which only a resumed run needs.
fetch() {
    run mkdir -p "$RESULTS" || return
    run gcloud storage rsync -r --exclude='.*/optimizer/.*' "$WORKDIR" "$RESULTS"
}
