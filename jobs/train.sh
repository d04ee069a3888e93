#!/bin/bash
# Train a run, from rows to scorecard; submitting it again resumes or follows it. usage: jobs/train.sh CONFIG RUN_ROOT [NAME]
set -euo pipefail
config=${1:?usage: jobs/train.sh CONFIG RUN_ROOT [NAME]}
root=${2:?usage: jobs/train.sh CONFIG RUN_ROOT [NAME]}
name=${3:-$(basename "$config" .yaml)}
cd "$(dirname "$0")/.."
# CPUS are the driver's own, beside its ranks'. With 0 it runs on the head: where the ranks need every core, a core of its own would wait for ever.
exec jobs/ray_submit.sh --entrypoint-num-cpus "${CPUS:-0}" -- "${PYTHON:-python}" -m hsmn_dist ensure "$config" \
  --name "$name" --set "run_root=$root" --set cluster.ray_address=auto --set cluster.launcher=ray
