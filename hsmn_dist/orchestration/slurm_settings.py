"""What a site and a job decide about a Slurm script, checked before a line is printed: each value lands in shell or in a directive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from hsmn_dist.foundation.errors import ConfigError

KINDS = ("one_node", "many_nodes", "preemptible")
MAX_SIGNAL_SECONDS = 65535
# Directives that the script counts on, and where each is decided.
DECIDED = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"), "cluster.* of the configuration"),
    **dict.fromkeys(("signal", "requeue", "no-requeue"), "the script itself (--signal-seconds)"),
    **{"time": "--time-limit", "partition": "--partition", "account": "--account", "qos": "--qos"},
    **{"mem": "--mem", "array": "--array"},
}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")
_ARRAY_PART = re.compile(r"(\d+)(?:-(\d+)(?::[1-9]\d*)?)?")
_DIRECTIVE = re.compile(r"--([a-z][a-z0-9-]*)(=[^\x00-\x1f\x7f]+)?")


@dataclass(frozen=True)
class SlurmSettings:
    """What a site and a job decide.

    Attributes:
        kind: one_node, many_nodes or preemptible.
        time_limit: Slurm's --time.
        partition, account, qos: left out when empty.
        mem: Slurm's --mem; empty: all of a node's memory where the nodes are exclusive, else the site's default.
        directives: further `#SBATCH` lines, each as sbatch takes it ("--constraint=h100").
        setup: shell line that makes `hsmn-dist` and `ray` available: a venv to activate, or nothing with a container.
        container: Apptainer image; every command then runs inside it.
        binds: folders for Apptainer's --bind, beside the submit folder, the run root and the configuration's folder.
        mlflow_uri: tracking server that the nodes reach; the configuration's when empty.
        signal_seconds: seconds before the time limit at which USR1 asks for a checkpoint.
        array: Slurm's --array, for studies ("0-7"): task i runs under the seed `seed + i` and a name of its own.
        name: the run's name; the configuration's and the kind when empty.
        run_root: folder of runs; the configuration's when empty.

    Raises:
        ConfigError: a value that Slurm or the script cannot take.
    """

    kind: str = "many_nodes"
    time_limit: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    mem: str = ""
    directives: tuple[str, ...] = ()
    setup: str = ". .venv/bin/activate"
    container: str = ""
    binds: tuple[str, ...] = ()
    mlflow_uri: str = ""
    signal_seconds: int = 300
    array: str = ""
    name: str = ""
    run_root: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--kind {self.kind}", allowed=", ".join(KINDS), action="choose one of them")
        words = "letters, digits and . _ - , + @ : without spaces"
        for flag, value in (("partition", self.partition), ("account", self.account), ("qos", self.qos)):
            _check(flag, value, r"[\w.,+@:-]+", words)
        _check("mem", self.mem, r"\d+[KMGT]?", "a number with K, M, G or T; 0 is all of a node's memory")
        _check("name", self.name, r"[A-Za-z0-9_.-]+", "letters, digits and . _ -")
        _check("container", self.container, r"[^\x00-\x1f]+", "the path of an Apptainer image")
        for bind in self.binds:
            _check("bind", bind or " ", r"[^\s:,][^:,\x00-\x1f]*(:[^:,\x00-\x1f]+){0,2}", "SOURCE[:TARGET[:ro]]")
        if self.binds and not self.container:
            raise ConfigError("--bind without --container", allowed="both, or neither", action="give --container IMAGE")
        for directive in self.directives:
            _check_directive(directive)
        self._check_times()
        array_indices(self.array)
        _check_server(self.mlflow_uri)

    def _check_times(self) -> None:
        """The signal comes within the time limit: otherwise the job would be asked to leave as soon as it starts, for ever."""
        limit = _seconds(self.time_limit)
        if not 0 < self.signal_seconds <= MAX_SIGNAL_SECONDS or (limit is not None and limit <= self.signal_seconds):
            raise ConfigError(
                f"--signal-seconds {self.signal_seconds} with --time-limit {self.time_limit}",
                allowed=f"1 to {MAX_SIGNAL_SECONDS} seconds, fewer than the time limit has",
                action="give a longer --time-limit or fewer --signal-seconds",
            )


def array_indices(array: str) -> tuple[int, int] | None:
    """Lowest and highest task of Slurm's --array; None without one.

    Raises:
        ConfigError: it is not of Slurm's form.
    """
    if not array:
        return None
    tasks, percent, at_once = array.partition("%")
    parts = [_ARRAY_PART.fullmatch(part) for part in tasks.split(",")]
    bounds = [(int(part[1]), int(part[2] or part[1])) for part in parts if part is not None]
    is_at_once_good = not percent or (at_once.isdigit() and int(at_once) > 0)
    if len(bounds) < len(parts) or not is_at_once_good or any(first > last for first, last in bounds):
        raise ConfigError(
            f"--array {array!r}",
            allowed="tasks as numbers and ranges, and after % how many may run at once: 0-7, 0,3,5, 0-26%4",
            action="for example: --array 0-7",
        )
    return min(first for first, _ in bounds), max(last for _, last in bounds)


def _check(flag: str, value: str, pattern: str, allowed: str) -> None:
    if value and not re.fullmatch(pattern, value):
        raise ConfigError(f"--{flag} {value!r}", allowed=allowed, action=f"change --{flag}")


def _check_directive(directive: str) -> None:
    match = _DIRECTIVE.fullmatch(directive)
    if match is None:
        raise ConfigError(
            f"--directive {directive!r}",
            allowed="one long option of sbatch, as --option or --option=value",
            action="for example: --directive=--constraint=h100",
        )
    if match[1] in DECIDED:
        raise ConfigError(
            f"--directive {directive!r}: the script counts on its own --{match[1]}",
            allowed=f"any option of sbatch but {', '.join(DECIDED)}",
            action=f"it is decided by {DECIDED[match[1]]}",
        )


def _check_server(uri: str) -> None:
    if not uri:
        return
    try:
        parts = urlsplit(uri)
        is_server = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.password
        )
    except ValueError:
        is_server = False
    if not is_server or re.search(r"[\s\x00-\x1f]", uri):
        raise ConfigError(
            f"--mlflow-uri {uri!r}",
            allowed="the address of an MLflow server that the nodes reach, without a password in it: http://HOST:PORT",
            action="start one with cluster/mlflow/start.sh, or leave the option out",
        )


def _seconds(time_limit: str) -> int | None:
    """Seconds of Slurm's --time; None when there is no limit."""
    if time_limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(time_limit)
    if match is None:
        raise ConfigError(
            f"--time-limit {time_limit!r}",
            allowed="MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES[:SECONDS], UNLIMITED",
            action="for example: --time-limit 24:00:00",
        )
    first, second, third = (int(part or 0) for part in match.groups()[1:])
    if match[1] is not None:
        return int(match[1]) * 86400 + first * 3600 + second * 60 + third
    if match[4] is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + second
