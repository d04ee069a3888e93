#!/bin/bash
# MLflow server for a team: basic authentication, allowed hosts, PostgreSQL (or SQLite for one machine), artifacts through the server.
#
#   MLFLOW_ADMIN_PASSWORD_FILE  file with the administrator's password (at least 12 characters); needed. It makes the account at the first
#                               start; later ones do not change it (cluster/README.md says how to)
#   MLFLOW_BACKEND_URI          postgresql://USER:PASSWORD@HOST/mlflow, the password percent-encoded; or MLFLOW_BACKEND_URI_FILE, a file
#                               that holds it
#   MLFLOW_AUTH_URI             database of users; the back end's own when absent
#   MLFLOW_ARTIFACTS            s3://BUCKET/PREFIX or a folder; ./mlartifacts when absent
#   MLFLOW_ALLOWED_HOSTS        Host headers that are answered, comma-separated; localhost when absent
#   MLFLOW_HOST, MLFLOW_PORT    127.0.0.1 and 5000 when absent
set -euo pipefail
umask 077 # the ini file and SQLite databases hold passwords; MLflow itself makes them readable to all
fail() { echo "start-mlflow: $1" >&2; exit 2; }

home=${MLFLOW_HOME:-$PWD/mlflow-server}
mkdir -p "$home"
[ -r "${MLFLOW_ADMIN_PASSWORD_FILE:-}" ] || fail "MLFLOW_ADMIN_PASSWORD_FILE must name a readable file with the administrator's password"
password=$(cat "$MLFLOW_ADMIN_PASSWORD_FILE")
[ "${#password}" -ge 12 ] || fail "the administrator's password has ${#password} characters; at least 12 are needed"
case $password in password1234 | password) fail "choose another administrator password than MLflow's default" ;; esac
case $password in *$'\n'*) fail "the administrator's password has more than one line" ;; esac

backend=${MLFLOW_BACKEND_URI:-}
if [ -n "${MLFLOW_BACKEND_URI_FILE:-}" ]; then backend=$(cat "$MLFLOW_BACKEND_URI_FILE"); fi
backend=${backend:-sqlite:///$home/mlflow.db}
auth=${MLFLOW_AUTH_URI:-}
if [ -z "$auth" ]; then
  case $backend in sqlite:*) auth=sqlite:///$home/users.db ;; *) auth=$backend ;; esac
fi

# MLflow reads the file with configparser, to which a percent sign is the beginning of a reference: two of them are one.
ini=$home/basic_auth.ini
cat > "$ini" <<INI
[mlflow]
default_permission = READ
database_uri = ${auth//%/%%}
admin_username = admin
admin_password = ${password//%/%%}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_CONFIG_PATH=$ini
# Signs the forms' tokens; made once and kept.
if [ ! -s "$home/secret" ]; then od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$home/secret"; fi
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$home/secret")
export MLFLOW_FLASK_SERVER_SECRET_KEY
# By the environment, not as an argument: a command line is visible to every user of the machine.
export MLFLOW_BACKEND_STORE_URI=$backend

exec mlflow server --app-name basic-auth --host "${MLFLOW_HOST:-127.0.0.1}" --port "${MLFLOW_PORT:-5000}" \
  --workers "${MLFLOW_WORKERS:-2}" --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-localhost,127.0.0.1,localhost:${MLFLOW_PORT:-5000},127.0.0.1:${MLFLOW_PORT:-5000}}" \
  --serve-artifacts --artifacts-destination "${MLFLOW_ARTIFACTS:-$home/artifacts}"
