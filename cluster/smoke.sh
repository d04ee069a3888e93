#!/bin/bash
# Is the cluster fit to train? Submits smoke.py to a running Ray cluster. usage: smoke.sh [http://HEAD:8265] [smoke.py's options]
set -euo pipefail
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  address=$1
  shift
fi
cd "$(dirname "$0")"
exec ray job submit --address "$address" --working-dir . -- "${PYTHON:-python}" smoke.py "$@"
