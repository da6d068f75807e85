#!/usr/bin/env bash
# What tpu_pod.sh and xpk.sh start on every host: sets the compiler's flags, and trains.
#
#   launch/on_host.sh tpu-v5p-256 --config=configs/mixtral.py:8x7b --workdir=gs://bucket/run
#
# Ends with the status of train.py; but with 143 where SIGTERM came, upon which train.py saves and ends
# with 0: whoever restarts failed containers then knows that the run is not done.
set -euo pipefail

machine="$1"
cd "$(dirname "$0")/.."
: "${PYTHON:=.venv/bin/python}"

LIBTPU_INIT_ARGS="$("$PYTHON" -m moe_jax.pods.xla_flags "$machine") ${LIBTPU_INIT_ARGS:-}"
export LIBTPU_INIT_ARGS

stopped=0
training=
stop() {
  stopped=1
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
if ((stopped)); then
  exit 143
fi
exit "$status"
