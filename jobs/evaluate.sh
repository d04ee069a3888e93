#!/bin/bash
# Score the weights of a run again. usage: jobs/evaluate.sh RUN RUN_ROOT
set -euo pipefail
run=${1:?usage: jobs/evaluate.sh RUN RUN_ROOT}
root=${2:?usage: jobs/evaluate.sh RUN RUN_ROOT}
cd "$(dirname "$0")/.."
exec ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" --entrypoint-num-cpus "${CPUS:-1}" \
  ${GPUS:+--entrypoint-num-gpus "$GPUS"} --runtime-env jobs/runtime_env.yaml --working-dir . -- \
  python -m hsmn_dist evaluate "$run" --run-root "$root"
