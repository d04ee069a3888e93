#!/bin/bash
# Score the weights of a run again. usage: jobs/evaluate.sh RUN RUN_ROOT
set -euo pipefail
run=${1:?usage: jobs/evaluate.sh RUN RUN_ROOT}
root=${2:?usage: jobs/evaluate.sh RUN RUN_ROOT}
cd "$(dirname "$0")/.."
exec jobs/ray_submit.sh --entrypoint-num-cpus "${CPUS:-1}" ${GPUS:+--entrypoint-num-gpus "$GPUS"} -- \
  "${PYTHON:-python}" -m hsmn_dist evaluate "$run" --run-root "$root"
