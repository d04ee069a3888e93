#!/bin/bash
# Prepare a run's shards on the cluster. usage: jobs/prepare.sh CONFIG RUN_ROOT
set -euo pipefail
config=${1:?usage: jobs/prepare.sh CONFIG RUN_ROOT}
root=${2:?usage: jobs/prepare.sh CONFIG RUN_ROOT}
cd "$(dirname "$0")/.."
exec jobs/ray_submit.sh --entrypoint-num-cpus "${CPUS:-1}" -- \
  "${PYTHON:-python}" -m hsmn_dist prepare "$config" --ray --ray-address auto --set "run_root=$root"
