#!/bin/bash
# `ray job submit` of this folder; what the other jobs call. usage: jobs/ray_submit.sh [options of ray job submit] -- COMMAND...
# Says in one line what Ray says in a traceback: nobody there, no token, a wrong token.
set -euo pipefail
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
token=${RAY_AUTH_TOKEN:-}
if [ -z "$token" ] && [ -r "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
  token=$(cat "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}")
fi
if command -v curl > /dev/null; then
  # The token goes by standard input: a command line is visible to every user of the machine.
  status=$(printf '%s\n' "${token:+header = \"Authorization: Bearer $token\"}" \
    | curl --silent --output /dev/null --max-time 20 --write-out '%{http_code}' --config - "$address/api/jobs/") || true
  case $status in
    401) echo "refused: $address wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" >&2; exit 2 ;;
    403) echo "refused: $address does not take this token; RAY_AUTH_TOKEN_PATH must name the file with the cluster's own" >&2; exit 2 ;;
    000) echo "refused: nobody answers at $address; set RAY_API_SERVER_ADDRESS=http://HEAD:8265" >&2; exit 2 ;;
  esac
fi
exec ray job submit --address "$address" --runtime-env jobs/runtime_env.yaml --working-dir . "$@"
