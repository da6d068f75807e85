#!/usr/bin/env bash
# What tpu_pod.sh and xpk.sh start on every host: sets the compiler's flags, and trains.
#
#   launch/on_host.sh tpu-v5p-256 --config=configs/mixtral.py:8x7b --workdir=gs://bucket/run
#
# Ends with the status of train.py, to which it passes SIGTERM on: 0 done, 143 stopped by SIGTERM after
# saving, 2 a mistake of the user's, 134 where another process died.
set -euo pipefail

machine="$1"
cd "$(dirname "$0")/.."
: "${PYTHON:=.venv/bin/python}"

LIBTPU_INIT_ARGS="$("$PYTHON" -m moe_jax.pods.xla_flags "$machine") ${LIBTPU_INIT_ARGS:-}"
export LIBTPU_INIT_ARGS

training=
stop() {
  kill -TERM "$training" 2>/dev/null || true
}
trap stop TERM

"$PYTHON" experiments/train.py --distributed "${@:2}" &
training=$!
# Each signal ends a `wait` before the process has ended; the last `wait` tells its status.
while kill -0 "$training" 2>/dev/null; do
  wait "$training" || true
done
status=0
wait "$training" || status=$?
exit "$status"
