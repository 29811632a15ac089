#!/usr/bin/env bash
# Trains on a TPU slice of your own:  launch/tpu_vm.sh create | install | train | fetch | delete | all
# Variables: launch/common.sh.        DRY_RUN=1 launch/tpu_vm.sh all   prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

create() {
    run gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" --accelerator-type="$TYPE" --version="$IMAGE" "${spot[@]}"
}

exists() {
    [[ -z $DRY_RUN ]] && gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" --format='value(state)' &>/dev/null
}

delete() {
    run gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet
}

all() {
    create_or_attach
    install
    train
    fetch
}

case ${1:-} in
create | install | train | fetch | delete | all) "$1" ;;
*) sed -n '2,3s/^# //p' "$0" >&2 && exit 2 ;;
esac
