"""Slurm batch scripts: one template, filled in; the files under cluster/slurm/ are its output for the shipped settings.

Unusual: one Ray cluster per allocation, by `ray start --block` under srun, with ports and a short temporary folder of its own, so that
jobs that share a node never meet; `ray stop` is not used, because it ends every Ray process of a host. TERM (scancel, preemption) and
USR1 (the time limit is near) are passed to what runs in front, the driver or the wait for Ray; the driver checkpoints and exits with 75;
the job then queues itself again. Measured on Slurm 22.05: a forwarded TERM arrives twice, so every handler is idempotent.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from hsmn_dist.config.run import RunConfig
from hsmn_dist.config.study import StudyConfig
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.orchestration.slurm_settings import SlurmSettings, array_indices

# Fixed ports lie above those of Ray's workers (10002 to 19999) and below those of outgoing connections (from 32768).
FIRST_PORT, END_OF_PORTS = 20000, 32768
HEAD_PORTS, NODE_PORTS = 4, 6


@dataclass(frozen=True)
class BatchJob:
    """What the script runs.

    Attributes:
        name: Slurm's name of the job.
        title: for people.
        command: shell words of the driver, quoted.
        folders: run root first, then what else a container must see.
        starts_ray: one Ray cluster over the allocation; otherwise the command brings its own ranks.
    """

    name: str
    title: str
    command: str
    folders: tuple[str, ...]
    starts_ray: bool = True


def slurm_script(config: RunConfig, config_path: str, settings: SlurmSettings, folders: Sequence[str] = ()) -> str:
    """The whole batch script for a run; with an array, for one run a task that differ by their seeds.

    A name belongs to settings, the number of nodes among them; so each kind has a name of its own.

    Args:
        config: the run.
        config_path: its file, as the nodes see it.
        settings: what a site and a job decide.
        folders: folders of files that it includes, for a container.
    """
    cluster = config.cluster
    num_nodes = 1 if settings.kind == "one_node" else cluster.num_nodes
    words = [
        *("hsmn-dist", "ensure", config_path, "--set", "cluster.ray_address=auto", "--set", "cluster.launcher=ray"),
        *("--set", f"cluster.num_nodes={num_nodes}"),
        *(["--set", f"tracking.uri={settings.mlflow_uri}"] if settings.mlflow_uri else []),
        *(["--set", f"run_root={settings.run_root}"] if settings.run_root else []),
    ]
    name = settings.name or f"{config.name}-{settings.kind}"
    own = f'--name "{name}-$SLURM_ARRAY_TASK_ID"' if settings.array else f'--name "{name}"'
    seeds = [f'--set "seed=$(({config.seed} + SLURM_ARRAY_TASK_ID))"'] if settings.array else []
    job = BatchJob(
        name=config.name,
        title=f"{config.name}: {num_nodes} x {cluster.ranks_per_node} ranks",
        command=" ".join([shlex.join(words), own, *seeds]),
        folders=(settings.run_root or config.run_root, str(PurePosixPath(config_path).parent), *folders),
    )
    return _filled(job, config, num_nodes, settings)


def study_slurm_script(
    study: StudyConfig,
    study_path: str,
    configs: Sequence[RunConfig],
    settings: SlurmSettings,
    folders: Sequence[str] = (),
) -> str:
    """The whole batch script for a study: an array whose task i brings run i to its end; the last one writes the report.

    The runs keep the settings that `hsmn-dist study` gives them, so that a study may be begun here and ended there.

    Args:
        study: the study.
        study_path: its file, as the nodes see it.
        configs: every run, variants in the file's order, seeds inside.
        settings: what a site and a job decide.
        folders: folders of files that the base includes, for a container.

    Raises:
        ConfigError: runs on different machines, tasks that the study does not have, or settings that belong in its file.
    """
    config = configs[0]
    cluster = config.cluster
    _check_study(study, configs, settings)
    bounds = array_indices(settings.array)
    if bounds is not None and bounds[1] >= len(configs):
        raise ConfigError(
            f"--array {settings.array}: the study {study.name} has {len(configs)} runs",
            allowed=f"0-{len(configs) - 1}",
            action="leave --array out for all of them, or end it sooner",
        )
    run_root, here = settings.run_root or "runs", PurePosixPath(study_path).parent
    words = ["hsmn-dist", "study", study_path, "--run-root", run_root]
    job = BatchJob(
        name=study.name,
        title=f"{study.name}: {len(configs)} runs, one a task, {cluster.num_nodes} x {cluster.ranks_per_node} ranks each",
        command=f'{shlex.join(words)} --task-index "$SLURM_ARRAY_TASK_ID"',
        folders=(run_root, str(here), str((here / study.base).parent), *folders),
        starts_ray=cluster.launcher == "ray" and cluster.ray_address == "auto",
    )
    return _filled(job, config, cluster.num_nodes, settings, settings.array or f"0-{len(configs) - 1}")


def _check_study(study: StudyConfig, configs: Sequence[RunConfig], settings: SlurmSettings) -> None:
    cluster = configs[0].cluster
    if any(config.cluster != cluster for config in configs):
        raise ConfigError(
            f"study {study.name}: its variants name different machines (cluster.*)",
            allowed="one allocation for all tasks of an array",
            action="give cluster.* in the base or in `overrides`, or split the study",
        )
    if settings.mlflow_uri or settings.name:
        raise ConfigError(
            f"--{'mlflow-uri' if settings.mlflow_uri else 'name'} with the study {study.name}",
            allowed="runs with the settings and names of the study's file",
            action="give tracking.uri in the study's `overrides`; names are the study's own",
        )
    if cluster.num_nodes > 1 and (cluster.launcher != "ray" or cluster.ray_address != "auto"):
        raise ConfigError(
            f"study {study.name}: {cluster.num_nodes} nodes without cluster.launcher=ray and cluster.ray_address=auto",
            allowed="runs of several nodes on the Ray cluster that the script starts, or runs of one node",
            action="add both to the study's `overrides`",
        )
    if settings.kind == "one_node" and cluster.num_nodes > 1:
        raise ConfigError(
            f"--kind one_node with the study {study.name} of {cluster.num_nodes} nodes",
            allowed="many_nodes, preemptible",
            action="leave --kind out, or give cluster.num_nodes=1 in the study's `overrides`",
        )


def _filled(job: BatchJob, config: RunConfig, num_nodes: int, settings: SlurmSettings, array: str = "") -> str:
    cluster = config.cluster
    cpus = max(1, round(cluster.cpus_per_rank * cluster.ranks_per_node))
    span = 10 if num_nodes == 1 else 100  # only jobs of one node share a node, and they need few ports each
    values = {
        "directives": "\n".join(_directives(job, config, num_nodes, cpus, settings, array or settings.array)),
        "title": job.title,
        "setup": settings.setup or ":",
        "container": shlex.quote(settings.container),
        "root": shlex.quote(job.folders[0]),
        "folders": " ".join(shlex.quote(folder) for folder in dict.fromkeys(job.folders)),
        "binds": " ".join(f"--bind {shlex.quote(bind)}" for bind in settings.binds),
        "gpus": str(cluster.ranks_per_node if cluster.device == "gpu" else 0),
        "cpus": str(cpus),
        "first": str(FIRST_PORT),
        "span": str(span),
        "blocks": str((END_OF_PORTS - FIRST_PORT) // span),
        "slots": str((span - HEAD_PORTS) // NODE_PORTS),
        "command": job.command,
    }
    uri = settings.mlflow_uri or config.tracking.uri
    values["uri"] = shlex.quote(uri)
    text = "\n".join([START, _tracking(config, uri), *([RAY] if job.starts_ray else []), END])
    return re.sub("@([a-z]+)@", lambda match: values[match[1]], text)  # once: a value is never filled in itself


def _tracking(config: RunConfig, uri: str) -> str:
    """The part of the script about the tracker: a question to a server, or what a database on a shared folder means."""
    if config.tracking.backend == "none":
        return TRACKS_NOTHING
    if uri.startswith(("http://", "https://")):
        return ASKS_SERVER
    return SQLITE if uri.startswith("sqlite:") or not uri else OTHER_STORE


def _directives(
    job: BatchJob, config: RunConfig, num_nodes: int, cpus: int, settings: SlurmSettings, array: str
) -> list[str]:
    rows = [f"--job-name={job.name}", f"--nodes={num_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    if config.cluster.device == "gpu":
        rows.append(f"--gpus-per-node={config.cluster.ranks_per_node}")
    log = "slurm-%x-%A_%a.log" if array else "slurm-%x-%j.log"
    rows += [f"--time={settings.time_limit}", f"--output={log}", "--open-mode=append", "--requeue"]
    rows.append(f"--signal=B:USR1@{settings.signal_seconds}")
    is_exclusive = num_nodes > 1 or settings.kind == "many_nodes"
    for flag, value in (
        ("partition", settings.partition),
        ("account", settings.account),
        ("qos", settings.qos or ("preemptible" if settings.kind == "preemptible" else "")),
        ("array", array),
        # A node of one's own still comes with the site's default memory per core, which is often a few GB.
        ("mem", settings.mem or ("0" if is_exclusive else "")),
    ):
        if value:
            rows.append(f"--{flag}={value}")
    if is_exclusive:
        rows.append("--exclusive")
    return [f"#SBATCH {row}" for row in [*rows, *settings.directives]]


START = """#!/bin/bash
# @title@
# Made by `hsmn-dist slurm`; change the configuration and make it again.
@directives@
# shellcheck disable=SC1091,SC2016,SC2329
set -euo pipefail
asked=""
trap 'asked=1' TERM USR1 # heard from the first line on; `ask` below does more
cd "${SLURM_SUBMIT_DIR:?run it with sbatch}"
@setup@
image=@container@
prefix=()
if [ -n "$image" ]; then # inside it, the same folders have the same paths
  mkdir -p @root@
  binds=(@binds@)
  for folder in "$PWD" @folders@; do binds+=(--bind "$(realpath -m "$folder")"); done
  prefix=(apptainer exec --nv "${binds[@]}" "$image")
fi
for file in cluster/nccl.env cluster/ray.env; do # the network, and how soon a lost node is declared dead
  if [ ! -f "$file" ]; then continue; fi
  set -a
  # shellcheck source=/dev/null
  . "$file"
  set +a
done

# One task of an array has the array's own number, which to squeue and scontrol means all of its tasks.
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
driver="" ended="" driven="" code=0
nodes=() own_files=()

ask() { # checkpoint and leave; may be called more than once
  if [ -n "$asked" ]; then return 0; fi # a bare `return` in a trap has the status of what was interrupted, and ends the script
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
  rm -rf "${own_files[@]}"
}
until_ended() { # exit code of a background process; `wait` comes last: a signal as the process ends makes bash wait for others instead
  local code=0
  while kill -0 "$1" 2>/dev/null; do sleep 0.5 || true; done
  wait "$1" || code=$?
  return "$code"
}
run() { # a command that hears of signals: `ask` passes them on; one that would start after the signal does not
  local code=0
  if [ -n "$asked" ]; then return 75; fi
  "$@" &
  driver=$!
  if [ -n "$asked" ]; then kill -TERM "$driver" 2>/dev/null || true; fi # the signal came in between
  until_ended "$driver" || code=$?
  driver=""
  return "$code"
}
trap ask TERM USR1
trap clean EXIT
"""

TRACKS_NOTHING = """# Tracking is off: metrics.jsonl in the run folder has every number.
"""

OTHER_STORE = """# MLflow writes from the nodes to the store that the configuration names. metrics.jsonl in the run folder is always written;
# `hsmn-dist track sync RUN` uploads later what could not be uploaded.
"""

SQLITE = """# MLflow is an SQLite file (the run root's mlflow.db where no other is named), written by the driver and by rank 0, from their own
# nodes. That needs file locks that work on the shared folder, which many an NFS and Lustre lacks; tasks and jobs that share it wait
# for each other. Where it fails, the log has a warning and the run goes on: metrics.jsonl is always written, and
# `hsmn-dist track sync RUN` uploads it later. For more than one node or job take a server: --mlflow-uri http://HOST:PORT.
"""

ASKS_SERVER = """# Does every node reach MLflow? A warning alone: metrics.jsonl is always written, and `hsmn-dist track sync RUN` uploads it later.
mlflow_script='import socket, sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1].rstrip("/") + "/health", timeout=10)
except Exception as error:
    if getattr(error, "code", 500) >= 500:
        print(f"warning: {socket.gethostname()} does not reach MLflow at {sys.argv[1]}: {error}; metrics.jsonl is written", flush=True)'
run srun --overlap --ntasks-per-node=1 --cpus-per-task=1 "${prefix[@]}" python -c "$mlflow_script" @uri@ ||
  if [ -z "$asked" ]; then echo "warning: MLflow at" @uri@ "could not be asked for; metrics.jsonl is written"; fi
"""

RAY = """# Ports, token and a short folder of this job alone: jobs that share a node never meet (a socket path has 107 bytes at most).
base=$((@first@ + SLURM_JOB_ID % @blocks@ * @span@))
export RAY_TMPDIR="/tmp/r$SLURM_JOB_ID"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.ray_token_$SLURM_JOB_ID"
own_files=("$RAY_AUTH_TOKEN_PATH" "$RAY_TMPDIR")
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=${RAY_HEAD_IP:-$(srun --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname -I | awk '{print $1}')} || true
if [ -z "$head_ip$asked" ]; then
  echo "error: ${hosts[0]} names no address (hostname -I); set RAY_HEAD_IP" >&2
  exit 1
fi
export RAY_ADDRESS="$head_ip:$base"

# On a node: Ray in a session of its own. TERM goes to all of a job at once; Ray must outlive the driver's checkpoint, so only USR2,
# which `clean` sends, ends it. A worker that is faster than a slow head tries again.
node_script='mkdir -p "$RAY_TMPDIR"
child="" stopped=""
stop() { stopped=1; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi; }
trap : TERM USR1
trap stop USR2
for _ in 1 2 3 4 5; do
  begun=$SECONDS
  if [ -n "$stopped" ]; then break; fi
  setsid "$@" &
  child=$!
  if [ -n "$stopped" ]; then stop; fi
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  if [ -n "$stopped" ] || [ $((SECONDS - begun)) -gt 300 ]; then break; fi
  sleep 3
done
rm -rf "$RAY_TMPDIR"'

ray_node() { # index host arguments...
  local index=$1 host=$2 ports
  shift 2
  ports=$((base + 4 + index % @slots@ * 6)) # six a node; they differ within a host, and may come again on another
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
join_script='import sys, time
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
        continue'
run "${prefix[@]}" python -c "$join_script" "${#hosts[@]}" || code=$?
"""

END = """if [ "$code" = 0 ] && [ -z "$asked" ]; then
  driven=1
  run "${prefix[@]}" @command@ || code=$?
fi
if [ -n "$asked" ]; then
  # Asked before the driver was there, or before it could listen (it died of TERM: 143, or 15 through Ray): what the run wrote is good.
  case "$driven:$code" in :* | 1:15 | 1:143) code=75 ;; esac
fi
again=""
if [ "$code" = 75 ]; then again=1; fi # a checkpoint was written
if [ "$code" = 1 ] && [ -n "$driven" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
  sleep 5
  for pid in "${nodes[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then again=1; fi # Ray died on a node: the last checkpoint is good
  done
fi
clean
if [ -n "$again" ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
  # Nobody cancelled the job: queue it again; it resumes.
  scontrol requeue "$job" || true
fi
exit "$code"
"""
