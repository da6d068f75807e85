#!/usr/bin/env bash
# Trains on a slice of Cloud TPU virtual machines until the run is done, from any machine with gcloud.
#
#   REPOSITORY=https://... WORKDIR=gs://bucket/run launch/tpu_pod.sh --topology=tpu-v5p-256 [--steps=9]
#
# Asks for the slice in the queue, installs the commit, and starts one process on every host. If the
# slice is taken away it asks for another, and the run continues from its newest checkpoint.
# docs/pods_launch.md explains the rest.
set -euo pipefail

: "${WORKDIR:?name a folder that every host can write to, such as gs://bucket/run}"
: "${CONFIG:=configs/mixtral.py:8x7b}"
: "${NAME:=moe-jax}"                       # Of the slice and of its place in the queue.
: "${ZONE:=us-east5-a}"                    # PROJECT is gcloud's default one.
: "${MACHINE:=tpu-v5p-256}"                # As experiments/compile_pod.py names it.
: "${RUNTIME:=v2-alpha-tpuv5}"
: "${CAPACITY:=--spot}"                    # Or --reserved, or empty for on-demand.
: "${REPOSITORY:?name the address from which every host can clone this repository}"
: "${COMMIT:=$(git rev-parse HEAD)}"         # There, too: push it first.
: "${ATTEMPTS:=20}"

# As Google Cloud names the machine.
ACCELERATOR="${MACHINE#tpu-}"
ACCELERATOR="${ACCELERATOR/#v5e/v5litepod}"

queue() {
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

state() {
  queue describe --format='value(state.state)' 2>/dev/null || echo NONE
}

wait_for_slice() {
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      NONE)
        # shellcheck disable=SC2086 - empty for on-demand.
        queue create --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
          --runtime-version="$RUNTIME" $CAPACITY ;;
      SUSPENDED | FAILED) queue delete --force --quiet ;;
    esac
    sleep 30
  done
}

# The images have an older Python than 3.11. Statuses are made 1, because make's 2 would be taken for
# the trainer's.
install="sudo apt-get update --quiet && sudo apt-get install --quiet --yes python3.11-venv &&
{ test -d moe_jax || git clone --quiet $REPOSITORY moe_jax; } &&
cd moe_jax && git fetch --quiet && git checkout --quiet $COMMIT &&
make install EXTRA=tpu PYTHON=python3.11 && make install EXTRA=gcs PYTHON=python3.11 || exit 1"

train="PYTHON=.venv-python3.11/bin/python moe_jax/launch/on_host.sh $MACHINE"
train+=" $(printf '%q ' --config="$CONFIG" --workdir="$WORKDIR" "$@")"

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  wait_for_slice
  # A slice that is just made, or just taken away, may refuse what it is asked for.
  status=0
  { everywhere "$install" && everywhere "$train"; } || status=$?
  # 0: done; 2: the user asked for something impossible.
  if ((status == 0 || status == 2)); then
    exit "$status"
  fi
  echo "attempt $attempt ended with status $status; trying again" >&2
  sleep 60
done
exit "$status"
