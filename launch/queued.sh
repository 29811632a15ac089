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

exists() {
    [[ -z $DRY_RUN ]] && state &>/dev/null
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

# Whether the slice is being taken away. Its state may change a little after its hosts have stopped.
taken_away() {
    local look
    for look in 1 2 3; do
        [[ $(state) == ACTIVE ]] || return 0
        [[ $look == 3 ]] || sleep "$POLL"
    done
    return 1
}

all() {
    create_or_attach
    until wait_until_active && install && train; do
        if ! taken_away; then
            echo "the training failed although the slice is well: see above" >&2
            return 1
        fi
        if [[ -z $created ]]; then
            echo "the slice was taken away, and this call did not create it: run '$0 delete', then this again" >&2
            return 1
        fi
        echo "the slice was taken away; a new one is requested, and the run resumes from the last checkpoint" >&2
        delete
        created=
        create_or_attach
    done
    fetch
}

case ${1:-} in
create | state | install | train | fetch | delete | all) "$1" ;;
*) sed -n '2,4s/^# //p' "$0" >&2 && exit 2 ;;
esac
