"""Slurm batch scripts: one function fills the template; the files under cluster/slurm/ are its output for the shipped settings.

Unusual: one Ray cluster per allocation, by `ray start --block` under srun, with ports and a short temporary folder of its own, so that
jobs that share a node never meet; `ray stop` is not used, because it ends every Ray process of a host. TERM (scancel, preemption) and
USR1 (the time limit is near) are passed to the driver, which checkpoints and exits with 75; the job then queues itself again.
Measured on Slurm 22.05: a forwarded TERM arrives twice, so every handler is idempotent.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from hsmn_dist.config.run import RunConfig


@dataclass(frozen=True)
class SlurmSettings:
    """What a site and a job decide.

    Attributes:
        kind: one_node, many_nodes or preemptible.
        time_limit: Slurm's --time.
        partition, account, qos: left out when empty.
        setup: shell line that makes `hsmn-dist` and `ray` available: a venv to activate, or nothing with a container.
        container: Apptainer image; every command then runs inside it.
        mlflow_uri: tracking server that the nodes reach; the configuration's when empty.
        signal_seconds: seconds before the time limit at which USR1 asks for a checkpoint.
        array: Slurm's --array, for studies ("0-7"): task i runs under the seed `seed + i` and a name of its own.
    """

    kind: str = "many_nodes"
    time_limit: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    setup: str = ". .venv/bin/activate"
    container: str = ""
    mlflow_uri: str = ""
    signal_seconds: int = 300
    array: str = ""


KINDS = ("one_node", "many_nodes", "preemptible")


def slurm_script(config: RunConfig, config_path: str, settings: SlurmSettings) -> str:
    """The whole batch script for a run."""
    cluster = config.cluster
    num_nodes = 1 if settings.kind == "one_node" else cluster.num_nodes
    cpus = max(1, round(cluster.cpus_per_rank * cluster.ranks_per_node))
    name = f"{config.name}-$SLURM_ARRAY_TASK_ID" if settings.array else config.name
    words = [
        *("hsmn-dist", "ensure", config_path, "--set", "cluster.ray_address=auto", "--set", "cluster.launcher=ray"),
        *("--set", f"cluster.num_nodes={num_nodes}"),
        *(["--set", f"tracking.uri={settings.mlflow_uri}"] if settings.mlflow_uri else []),
    ]
    seeds = [f'--set "seed=$(({config.seed} + SLURM_ARRAY_TASK_ID))"'] if settings.array else []
    values = {
        "directives": "\n".join(_directives(config, settings, num_nodes, cpus)),
        "title": f"{config.name}: {num_nodes} x {cluster.ranks_per_node} ranks",
        "setup": settings.setup or ":",
        "container": shlex.quote(settings.container),
        "gpus": str(cluster.ranks_per_node if cluster.device == "gpu" else 0),
        "cpus": str(cpus),
        "grace": str(int(cluster.grace_seconds)),
        "command": " ".join([shlex.join(words), f'--name "{name}"', *seeds]),
    }
    text = TEMPLATE
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _directives(config: RunConfig, settings: SlurmSettings, num_nodes: int, cpus: int) -> list[str]:
    rows = [f"--job-name={config.name}", f"--nodes={num_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    if config.cluster.device == "gpu":
        rows.append(f"--gpus-per-node={config.cluster.ranks_per_node}")
    rows += [f"--time={settings.time_limit}", "--output=slurm-%x-%j.log", "--open-mode=append", "--requeue"]
    rows.append(f"--signal=B:USR1@{settings.signal_seconds}")
    for flag, value in (
        ("partition", settings.partition),
        ("account", settings.account),
        ("qos", settings.qos or ("preemptible" if settings.kind == "preemptible" else "")),
        ("array", settings.array),
    ):
        if value:
            rows.append(f"--{flag}={value}")
    if num_nodes > 1 or settings.kind == "many_nodes":
        rows.append("--exclusive")
    return [f"#SBATCH {row}" for row in rows]


TEMPLATE = """#!/bin/bash
# @title@
# Made by `hsmn-dist slurm`; change the configuration and make it again.
@directives@
# shellcheck disable=SC1091,SC2016,SC2329
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run it with sbatch}"
@setup@
image=@container@
prefix=()
if [ -n "$image" ]; then prefix=(apptainer exec --nv "$image"); fi

# Ports, token and a short folder of this job alone: jobs that share a node never meet (a socket path has 107 bytes at most).
base=$((20000 + SLURM_JOB_ID % 400 * 100))
export RAY_TMPDIR="/tmp/r$SLURM_JOB_ID"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.ray_token_$SLURM_JOB_ID"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")
for file in cluster/nccl.env cluster/ray.env; do # the network, and how soon a lost node is declared dead
  if [ ! -f "$file" ]; then continue; fi
  set -a
  # shellcheck source=/dev/null
  . "$file"
  set +a
done

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=${RAY_HEAD_IP:-$(srun --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname -I | awk '{print $1}')}
export RAY_ADDRESS="$head_ip:$base"
driver="" asked="" ended=""
nodes=()

ask() { # checkpoint and leave; may be called more than once
  if [ -n "$asked" ]; then return; fi
  asked=1
  if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi
}
clean() {
  if [ -n "$ended" ]; then return; fi
  ended=1
  trap : TERM USR1
  if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi
  for pid in "${nodes[@]}"; do kill -USR2 "$pid" 2>/dev/null || true; done
  for _ in $(seq 30); do
    alive=""
    for pid in "${nodes[@]}"; do if kill -0 "$pid" 2>/dev/null; then alive=1; fi; done
    if [ -z "$alive" ]; then break; fi
    sleep 0.5
  done
  for pid in $driver "${nodes[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  rm -rf "$RAY_AUTH_TOKEN_PATH" "$RAY_TMPDIR"
}
until_ended() { # exit code of a background process; a signal that ends `wait` early is not its end
  local code
  while :; do
    code=0
    wait "$1" || code=$?
    if ! kill -0 "$1" 2>/dev/null; then break; fi
  done
  code=0
  wait "$1" || code=$?
  return "$code"
}
trap ask TERM USR1
trap clean EXIT

# On a node: Ray in a session of its own. TERM goes to all of a job at once; Ray must outlive the driver's checkpoint, so only USR2,
# which `clean` sends, ends it. A worker that is faster than a slow head tries again.
node_script='mkdir -p "$RAY_TMPDIR"
child="" stopped=""
stop() { stopped=1; kill -TERM "$child"; }
trap : TERM USR1
trap stop USR2
for _ in 1 2 3 4 5; do
  begun=$SECONDS
  setsid "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  if [ -n "$stopped" ] || [ $((SECONDS - begun)) -gt 300 ]; then break; fi
  sleep 3
done
rm -rf "$RAY_TMPDIR"'

ray_node() { # index host arguments...
  local index=$1 host=$2 ports
  shift 2
  ports=$((base + 10 + index * 20))
  srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=@cpus@ --nodelist="$host" \\
    bash -c "$node_script" ray "${prefix[@]}" \\
    ray start --block --disable-usage-stats --num-cpus=@cpus@ --num-gpus=@gpus@ \\
    --node-manager-port=$ports --object-manager-port=$((ports + 1)) --runtime-env-agent-port=$((ports + 2)) \\
    --dashboard-agent-grpc-port=$((ports + 3)) --dashboard-agent-listen-port=$((ports + 4)) \\
    --metrics-export-port=$((ports + 5)) "$@" &
  nodes+=("$!")
}
ray_node 0 "${hosts[0]}" --head --node-ip-address="$head_ip" --port="$base" --temp-dir="$RAY_TMPDIR" \\
  --dashboard-host=127.0.0.1 --dashboard-port=$((base + 1)) --ray-client-server-port=$((base + 2))
for index in $(seq 1 $((${#hosts[@]} - 1))); do
  ray_node "$index" "${hosts[$index]}" --address="$RAY_ADDRESS"
done

# Wait until every node has joined.
"${prefix[@]}" python - "${#hosts[@]}" <<'PYTHON' &
import sys, time
import ray

deadline = time.time() + 600
alive = 0
while alive < int(sys.argv[1]):
    if time.time() > deadline:
        sys.exit(f"only {alive} of {sys.argv[1]} nodes joined the Ray cluster within 600 s")
    time.sleep(2)
    try:
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        continue
PYTHON
driver=$!
until_ended "$driver"
driver=""
if [ -n "$asked" ]; then exit 75; fi

"${prefix[@]}" @command@ &
driver=$!
code=0
until_ended "$driver" || code=$?
driver=""
again=""
if [ "$code" = 75 ]; then again=1; fi # a checkpoint was written
if [ "$code" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
  sleep 5
  for pid in "${nodes[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then again=1; fi # Ray died on a node: the last checkpoint is good
  done
fi
clean
if [ -n "$again" ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  # Nobody cancelled the job: queue it again; it resumes.
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
"""
