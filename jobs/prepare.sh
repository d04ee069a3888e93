#!/bin/bash
# Prepare a run's shards on the cluster. usage: jobs/prepare.sh CONFIG RUN_ROOT
set -euo pipefail
config=${1:?usage: jobs/prepare.sh CONFIG RUN_ROOT}
root=${2:?usage: jobs/prepare.sh CONFIG RUN_ROOT}
cd "$(dirname "$0")/.."
exec ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" --entrypoint-num-cpus "${CPUS:-1}" \
  --runtime-env jobs/runtime_env.yaml --working-dir . -- \
  python -m hsmn_dist prepare "$config" --ray --ray-address auto --set "run_root=$root"
