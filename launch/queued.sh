#!/usr/bin/env bash
# Trains on a queued, usually spot, TPU slice, and again on a new one whenever it is taken away, until done:
#   launch/queued.sh all | create | state | install | train | fetch | delete
# Variables: launch/common.sh.        DRY_RUN=1 launch/queued.sh all   prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

create() {
    run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$IMAGE" "${spot[@]}"
}

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED (taken away), FAILED, ...
state() {
    if [[ -n $DRY_RUN ]]; then
        echo ACTIVE
    else
        gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
    fi
}

delete() {
    run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

wait_until_active() {
    local now
    until now=$(state) && [[ $now == ACTIVE ]]; do
        [[ $now != FAILED && $now != SUSPENDED ]] || return 1
        sleep "$POLL"
    done
}

# Whether the slice is being taken away; that may show a little after its hosts have stopped.
taken_away() {
    local look
    for look in 1 2 3; do
        [[ $(state) == ACTIVE ]] || return 0
        [[ $look == 3 ]] || sleep "$POLL"
    done
    return 1
}

all() {
    trap delete EXIT # whatever happens, the slice does not go on costing money
    create
    until wait_until_active && install && train; do
        if ! taken_away; then
            echo "the training failed on a slice that is well: see above" >&2
            return 1
        fi
        echo "the slice was taken away; asking for another, which goes on from the last checkpoint" >&2
        delete
        create
    done
    fetch
}

case ${1:-} in
create | state | install | train | fetch | delete | all) "$1" ;;
*) sed -n '2,4s/^# //p' "$0" >&2 && exit 2 ;;
esac
