#!/bin/bash
# One run for each seed, one after another, each under a name of its own; what is complete is skipped.
# usage: jobs/study.sh CONFIG RUN_ROOT SEED...
set -euo pipefail
config=${1:?usage: jobs/study.sh CONFIG RUN_ROOT SEED...}
root=${2:?usage: jobs/study.sh CONFIG RUN_ROOT SEED...}
shift 2
cd "$(dirname "$0")/.."
for seed in "$@"; do
  jobs/ray_submit.sh -- "${PYTHON:-python}" -m hsmn_dist ensure "$config" --name "$(basename "$config" .yaml)-seed$seed" \
    --set "seed=$seed" --set "run_root=$root" --set cluster.ray_address=auto --set cluster.launcher=ray
done
