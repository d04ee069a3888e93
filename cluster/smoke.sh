#!/bin/bash
# Is the cluster fit to train? Submits smoke.py to a running Ray cluster. usage: smoke.sh [ADDRESS] [smoke.py's options]
set -euo pipefail
address=${1:-http://127.0.0.1:8265}
shift || true
cd "$(dirname "$0")"
exec ray job submit --address "$address" --working-dir . -- "${PYTHON:-python}" smoke.py "$@"
