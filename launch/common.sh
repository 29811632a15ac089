#!/usr/bin/env bash
# The variables of tpu_vm.sh and queued.sh, and their common steps. Set the variables in the environment or here. Every
# step returns its own failure, because `set -e` has no effect inside a condition.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-dreambooth}                  # of the slice, and of the run
TYPE=${TYPE:-v5litepod-8}                 # slice: v5litepod-1 to -256, v6e-1 to -256, v5p-8, v4-8, ...
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}       # runtime version: v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base for v4
SPOT=${SPOT:-1}                           # 1: cheaper, may be taken away at any time; empty: on demand
WORKDIR=${WORKDIR:-gs://my-bucket/$NAME}  # one place for all hosts: checkpoints, class images, samples
MODULE=${MODULE:-train}                   # or "evaluate", scores of the run in WORKDIR; "protocol", configs/protocol.py
PHOTOS=${PHOTOS:-examples/subjects/dog}   # folder of three to five pictures, copied to every host; or gs://, tfds:, hub:
                                          # (MODULE=protocol: the data set's folder)
RESULTS=${RESULTS:-results/$NAME}         # where fetch brings samples, metrics and trained weights to
case $MODULE in
train) DEFAULTS=(configs/dog.py:sd15 "--config.batch_size=8 --config.mesh_fsdp=8") ;;
evaluate) DEFAULTS=("" "") ;;
protocol) DEFAULTS=(configs/protocol.py:sd15 "--config.train.batch_size=8 --config.train.mesh_fsdp=8") ;;
*) echo "MODULE=$MODULE: expected train, evaluate or protocol" >&2 && exit 2 ;;
esac
CONFIG=${CONFIG:-${DEFAULTS[0]}}
ARGS=${ARGS-${DEFAULTS[1]}}               # more --config.FIELD=VALUE; quotes keep spaces together
POLL=${POLL:-20}                          # seconds between two looks at the state of a slice
DRY_RUN=${DRY_RUN:-}                      # 1: print the commands instead of running them

PROJECT_FILES=(setup.py pyproject.toml README.md LICENSE dreambooth_jax configs examples) # what an installation needs
where=(--project="$PROJECT" --zone="$ZONE")
# shellcheck disable=SC2034 # used by the scripts that source this one
spot=(${SPOT:+--spot})
created= # 1 once the slice of that name is this call's own

run() {
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    [[ -n $DRY_RUN ]] || "$@"
}

# The words of a remote command, quoted for the host's shell.
quoted() {
    printf ' %q' "$@"
}

on_all_hosts() {
    run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

# A slice that exists already is used and stays; a new one is deleted when this call ends, however it ends.
create_or_attach() {
    if exists; then
        echo "a slice named $NAME exists: it is used, and not deleted afterwards" >&2
        return
    fi
    created=1
    trap delete_created EXIT
    if ! create; then
        created=
        echo "the slice was not created: see above. If a slice named $NAME exists now, '$0 delete' deletes it" >&2
        return 1
    fi
}

# shellcheck disable=SC2317 # called by the trap
delete_created() {
    [[ -z $created ]] || delete
}

# Whether PHOTOS is a folder of this machine.
photos_are_here() {
    [[ $PHOTOS != *://* && $PHOTOS != tfds:* && $PHOTOS != hub:* ]]
}

# Copies the package, the configs and the photos to every host and installs them into a virtual environment.
install() {
    if photos_are_here && [[ ! -d $PHOTOS ]]; then
        echo "PHOTOS=$PHOTOS: no such folder; expected a folder of pictures" >&2
        return 1
    fi
    copy_to_hosts || return 1
    on_all_hosts "mkdir -p job && (cd job && rm -rf photos ${PROJECT_FILES[*]}) && tar -xzf job.tgz -C job && rm job.tgz && cd job &&
        python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.11 env &&
        python3 -m uv pip install -q --python env -e '.[tpu]'"
}

# In a shell of its own, whose trap removes the copies of the photos however it ends.
copy_to_hosts() (
    photos=() stage=$(mktemp -d)
    trap 'rm -rf "$stage"' EXIT
    if photos_are_here; then
        run cp -RL -- "$PHOTOS" "$stage/photos" || exit
        photos=(-C "$stage" photos)
    fi
    run tar -czf "$stage/job.tgz" --exclude=__pycache__ "${PROJECT_FILES[@]}" "${photos[@]}" || exit
    run gcloud compute tpus tpu-vm scp "$stage/job.tgz" "$NAME:job.tgz" "${where[@]}" --worker=all
)

# Starts the same command on every host; it resumes from the last checkpoint in WORKDIR. Compiled programs are kept
# there too, for the next slice. MODULE says which command it is.
train() {
    local source=photos args=() what=()
    photos_are_here || source=$PHOTOS
    case $MODULE in
    train) what=(train --config "$CONFIG" --config.workdir="$WORKDIR" --config.instance_images="$source") ;;
    evaluate) what=(evaluate --workdir "$WORKDIR") ;;
    protocol) what=(evaluate --config "$CONFIG" --config.workdir="$WORKDIR" --config.dataset="$source") ;;
    esac
    if [[ -n $ARGS ]]; then # xargs splits words at quotes as a shell does, and runs nothing
        if ! xargs printf '%s\0' <<<"$ARGS" >/dev/null; then
            echo "ARGS=$ARGS: expected words, each quote closed on its own line" >&2
            return 2
        fi
        mapfile -d '' -t args < <(xargs printf '%s\0' <<<"$ARGS")
    fi
    on_all_hosts "cd job &&$(quoted env "JAX_COMPILATION_CACHE_DIR=$WORKDIR/xla" env/bin/python -m \
        "dreambooth_jax.${what[0]}" "${what[@]:1}" "${args[@]}")"
}

# Fetches everything but the optimizer's state, which only a resumed run needs, and the compiled programs.
fetch() {
    run mkdir -p -- "$RESULTS" || return
    run gcloud storage rsync -r --exclude='.*/optimizer/.*|xla/.*' "$WORKDIR" "$RESULTS"
}
