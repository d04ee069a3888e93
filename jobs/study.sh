#!/bin/bash
# Every method with every seed of a study, as one job, and its report; submitted again, it goes on.
# usage: jobs/study.sh FILE RUN_ROOT
set -euo pipefail
file=${1:?usage: jobs/study.sh FILE RUN_ROOT}
root=${2:?usage: jobs/study.sh FILE RUN_ROOT}
cd "$(dirname "$0")/.."
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
# A study has no lease. Its id keeps two jobs apart: Ray refuses to delete the one that runs, and to start another of its id.
id="study-$(printf '%s\n' "$file" "$root" | sha256sum | cut -c 1-16)"
if ray job status "$id" 2> /dev/null | grep -Eq 'PENDING|RUNNING'; then
  echo "refused: this study runs as $id; follow it with: ray job logs --follow $id" >&2
  exit 2
fi
ray job delete "$id" > /dev/null 2>&1 || true
exec jobs/ray_submit.sh --submission-id "$id" --entrypoint-num-cpus "${CPUS:-1}" ${GPUS:+--entrypoint-num-gpus "$GPUS"} -- \
  "${PYTHON:-python}" -m hsmn_dist study "$file" --run-root "$root"
