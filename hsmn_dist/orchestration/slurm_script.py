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
        stages_in: seconds before the time limit at which USR1 asks for a checkpoint.
        array: Slurm's --array, for studies ("0-7"); the run's name gets the task number.
        gpus_per_node: None takes the configuration's ranks per node on GPU runs, and none on CPU runs.
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
    values = {
        "directives": "\n".join(_directives(config, settings, num_nodes, cpus)),
        "title": f"{config.name}: {num_nodes} x {cluster.ranks_per_node} ranks",
        "setup": settings.setup or ":",
        "container": shlex.quote(settings.container),
        "gpus": str(cluster.ranks_per_node if cluster.device == "gpu" else 0),
        "cpus": str(cpus),
        "grace": str(int(cluster.grace_seconds)),
        "command": f'{shlex.join(words)} --name "{name}"',
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
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run it with sbatch}"
@setup@
image=@container@
inside() { if [ -n "$image" ]; then apptainer exec --nv "$image" "$@"; else "$@"; fi; }

# Ports and a short folder of this job alone: jobs that share a node never meet (a socket path has 107 bytes at most).
base=$((20000 + SLURM_JOB_ID % 400 * 100))
export RAY_TMPDIR="/tmp/r$SLURM_JOB_ID"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.ray_token_$SLURM_JOB_ID"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")
if [ -f cluster/nccl.env ]; then set -a && . cluster/nccl.env && set +a; fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=${RAY_HEAD_IP:-$(srun --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname -I | awk '{print $1}')}
export RAY_ADDRESS="$head_ip:$base"
driver="" ray_pid="" asked="" ended=""

ask() { # checkpoint and leave; may be called more than once
  if [ -n "$asked" ]; then return; fi
  asked=1
  if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi
}
clean() {
  if [ -n "$ended" ]; then return; fi
  ended=1
  trap '' TERM USR1
  for pid in $driver $ray_pid; do kill -TERM "$pid" 2>/dev/null || true; done
  for _ in $(seq 20); do
    if ! kill -0 $ray_pid 2>/dev/null; then break; fi
    sleep 0.5
  done
  for pid in $driver $ray_pid; do kill -KILL "$pid" 2>/dev/null || true; done
  rm -rf "$RAY_AUTH_TOKEN_PATH" "$RAY_TMPDIR"
}
trap ask TERM USR1
trap clean EXIT

ray_node() { # index host arguments...
  local index=$1 host=$2 ports
  shift 2
  ports=$((base + 10 + index * 20))
  srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=@cpus@ --nodelist="$host" --kill-on-bad-exit=1 \\
    bash -c 'mkdir -p "$RAY_TMPDIR"; exec "$@"' ray $(if [ -n "$image" ]; then echo apptainer exec --nv "$image"; fi) \\
    ray start --block --disable-usage-stats --num-cpus=@cpus@ --num-gpus=@gpus@ \\
    --node-manager-port=$ports --object-manager-port=$((ports + 1)) --runtime-env-agent-port=$((ports + 2)) \\
    --dashboard-agent-grpc-port=$((ports + 3)) --dashboard-agent-listen-port=$((ports + 4)) \\
    --metrics-export-port=$((ports + 5)) "$@" &
  ray_pid="$ray_pid $!"
}
ray_node 0 "${hosts[0]}" --head --node-ip-address="$head_ip" --port="$base" --temp-dir="$RAY_TMPDIR" \\
  --dashboard-host=127.0.0.1 --dashboard-port=$((base + 1)) --ray-client-server-port=$((base + 2))
for index in $(seq 1 $((${#hosts[@]} - 1))); do
  ray_node "$index" "${hosts[$index]}" --address="$RAY_ADDRESS"
done

# Wait until every node has joined.
inside python - "${#hosts[@]}" <<'PYTHON' &
import sys, time, ray
deadline = time.time() + 300
while True:
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        break
    except ConnectionError:
        if time.time() > deadline:
            raise
        time.sleep(2)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    if time.time() > deadline:
        sys.exit(f"only {sum(node['Alive'] for node in ray.nodes())} of {sys.argv[1]} nodes joined")
    time.sleep(1)
PYTHON
driver=$!
wait "$driver"
driver=""
if [ -n "$asked" ]; then exit 75; fi

inside @command@ &
driver=$!
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # a signal ends `wait` early: the driver is still writing its checkpoint
  code=0
  wait "$driver" || code=$?
done
driver=""
if [ "$code" = 75 ]; then
  # A checkpoint was written: queue the same job again; it resumes. A site with RequeueExit=75 does so by itself.
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
"""
