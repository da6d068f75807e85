#!/usr/bin/env bash
# Trains on one slice or several of a GKE cluster, through XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=mine IMAGE=gcr.io/project/moe_jax WORKDIR=gs://bucket/run launch/xpk.sh \
#       --topology=tpu-v5p-256 [--steps=1000]
#
# The image has this repository in /moe_jax, after `make install EXTRA=tpu` and
# `make install EXTRA=gcs` in it. docs/pods_launch.md explains the rest.
set -euo pipefail

: "${WORKDIR:?name a folder that every host can write to, such as gs://bucket/run}"
: "${CLUSTER:?name the GKE cluster}"
: "${IMAGE:?name the container image}"
: "${CONFIG:=configs/mixtral.py:8x7b}"
: "${NAME:=moe-jax}"
: "${SLICES:=1}"
: "${MACHINE:=tpu-v5p-256}"                # One slice, as experiments/compile_pod.py names it.
: "${RESTARTS:=50}"
: "${GRACE_SECONDS:=600}"                  # For the checkpoint that is written on SIGTERM.

# As XPK names the machine.
TPU_TYPE="${MACHINE#tpu-}"
TPU_TYPE="${TPU_TYPE/#v5e/v5litepod}"

flags="$(printf '%q ' --config="$CONFIG" --workdir="$WORKDIR" "$@")"
# On one line, because XPK puts it into a YAML file.
exec xpk workload create --cluster="$CLUSTER" --workload="$NAME" --docker-image="$IMAGE" \
  --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --max-restarts="$RESTARTS" \
  --termination-grace-period-seconds="$GRACE_SECONDS" \
  --command="exec /moe_jax/launch/on_host.sh '$SLICES*$MACHINE' $flags"
