"""Ray's job server: submit a run by name, follow its log, return its exit code. Token authentication, no environment.

Unusual: a submission id is made from the run's name, and Ray refuses a second job of the same id, so submitting twice
follows the first, if it asks for the same settings. The job's command is `hsmn-dist ensure`, whose lease keeps two
drivers apart even where two job servers share a disk. Who follows outlives a job server that starts again; Ray's own
client raises at once, or waits for ever. Measured with Ray 2.60: 401 without a token, 403 with a wrong one. Traffic is
not encrypted: use a private network or a tunnel.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from hsmn_dist.foundation.errors import ConfigError, StageFailed

ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
CACHES = ["/.mypy_cache/", "/.pytest_cache/", "/.ruff_cache/", "__pycache__"]
EXCLUDES = ["/runs/", "/.venv/", "/.git/", "/mlruns/", "*.tar", "*.safetensors", *CACHES]
POLL_SECONDS = 1.0
EXIT_PREEMPTED = 75
AGENT_SECONDS = 90.0
REQUEST_SECONDS = 120.0
OUTAGE_SECONDS = 300.0
# A job that is replaced is unknown for a moment; one that its server forgot stays so.
UNKNOWN_SECONDS = 20.0
# A connection whose other end lost its power says nothing for ever: the log is asked for again after this silence.
SILENCE_SECONDS = 120.0
NO_ANSWER = (OSError, RuntimeError, RayError, aiohttp.ClientError, asyncio.TimeoutError)
T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class JobRequest:
    """What is submitted.

    Attributes:
        name: of the run; decides the submission id.
        entrypoint: shell line that the head node runs.
        working_dir: folder that is uploaded; "" where every node's image has the program.
        pip_packages: what a bare node must install first.
        environment: variables of the job.
        num_cpus: cores that the driver itself reserves; with 0 it runs on the head node.
        ranks_num_cpus: cores that its ranks will reserve.
        grace_seconds: time between a stop and the kill.
        settings_digest: of what is run. Two submissions of one name must agree in it; where it is "", in the entrypoint.
    """

    name: str
    entrypoint: str
    working_dir: str = ""
    pip_packages: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    num_cpus: float = 0.0
    ranks_num_cpus: float = 0.0
    grace_seconds: float = 60.0
    settings_digest: str = ""

    @property
    def submission_id(self) -> str:
        """Equal for equal names; only characters that Ray takes."""
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", self.name)
        return f"hsmn-{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment."""
        # COLUMNS: a job has no terminal, and at the 80 columns that are then assumed tables shorten the names of tasks.
        defaults = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(self.grace_seconds) + 30), "COLUMNS": "160"}
        env: dict[str, Any] = {"env_vars": {**defaults, **self.environment}}
        if self.working_dir:
            env |= {"working_dir": self.working_dir, "excludes": EXCLUDES}
        if self.pip_packages:
            env["pip"] = {"packages": list(self.pip_packages), "pip_check": False}
        return env


class JobServer(JobSubmissionClient):
    """Ray's client with a limit on every request, patience, and the size of the cluster."""

    num_outages = 0

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_SECONDS, **options})

    @property
    def where(self) -> str:
        """Its address."""
        return str(self._address)

    def cluster_num_cpus(self) -> float | None:
        """Cores of all nodes that are alive; None where this server does not tell."""
        with suppress(*NO_ANSWER, KeyError, TypeError, ValueError):
            answer = self._do_request("GET", "/api/v0/nodes?limit=10000&detail=true").json()
            nodes = answer["data"]["result"]["result"]
            return sum(float(n["resources_total"].get("CPU", 0)) for n in nodes if n["state"] == "ALIVE")
        return None

    def patiently(self, ask: Callable[[], T], say: Say) -> T:
        """What `ask` asks of this server; while it is away, as a head that starts again is, for a bounded time.

        Raises:
            StageFailed: it stayed away.
            ConfigError: it no longer takes the token.
        """
        begun, told = time.monotonic(), False
        while True:
            try:
                answer = ask()
            except AuthenticationError as error:
                raise _refused(self.where, str(error)) from None
            except NO_ANSWER as error:
                why = _last_line(str(error))
            else:
                if told:
                    say("the job server answers again")
                return answer
            limit = UNKNOWN_SECONDS if "does not exist" in why else OUTAGE_SECONDS
            if time.monotonic() - begun > limit:
                raise StageFailed(
                    f"the job server at {self.where} gave no answer for {limit:.0f} s: {why}",
                    allowed="a job server that answers and knows the job",
                    action="when the head node is back, submit the run again: it is followed or resumed",
                )
            if not told:
                say(f"the job server does not answer ({why}); trying again for {limit:.0f} s")
                told, self.num_outages = True, self.num_outages + 1
            time.sleep(POLL_SECONDS)

    def find(self, identity: str, say: Say) -> JobDetails | None:
        """The job of that submission id."""
        jobs = self.patiently(self.list_jobs, say)
        return next((job for job in jobs if job.submission_id == identity), None)


def connect(address: str, token_file: Path | None = None) -> JobServer:
    """A client of the job server.

    Raises:
        ConfigError: it cannot be reached, or refuses the token.
    """
    headers = {}
    if token_file is not None:
        if not token_file.is_file():
            raise ConfigError(
                f"{token_file}: no such token file",
                allowed="a file with the cluster's token",
                action="see cluster/README.md",
            )
        headers["Authorization"] = f"Bearer {token_file.read_text(encoding='utf-8').strip()}"
    try:
        client = JobServer(address, headers=headers or None)
        client.list_jobs()
    except (*NO_ANSWER, ValueError) as error:
        raise _refused(address, str(error)) from None
    return client


def _refused(address: str, text: str) -> ConfigError:
    first = text.strip().splitlines()[0][:300] if text.strip() else "no answer"
    is_token = any(mark in text for mark in ("401", "403", "Unauthorized", "Forbidden", "uthenticat"))
    action = (
        "give the cluster's token with --token-file"
        if is_token
        else "check that the dashboard runs there (`ray start --head --dashboard-host`), the port (8265) and the firewall"
    )
    return ConfigError(
        f"the job server at {address} cannot be used: {first}", allowed="http://HOST:8265", action=action
    )


def _last_line(text: str) -> str:
    """What an error of the job server says. A traceback says it in its last line; Ray puts a dot behind the text."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:300] if lines else "no answer"


def submit(client: JobServer, request: JobRequest, say: Say) -> str:
    """Submit, or find the job of the same name; returns the submission id.

    A job of that name that ended is replaced, which resumes its run.

    Raises:
        ConfigError: the name's job runs with other settings, or the cluster refuses the job.
    """
    identity = request.submission_id
    request = _leave_room(client, request, say)
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        known = client.find(identity, say)
        if known is not None and known.status not in ENDED:
            _require_same(request, known)
            say(f"{request.name} is {known.status.value} as {identity}: following it")
            return identity
        try:
            if known is not None:
                say(f"{request.name} ended as {known.status.value}: submitting it again")
                client.delete_job(identity)
            _submit(client, request)
            say(f"submitted {identity}")
            return identity
        except AuthenticationError as error:
            raise _refused(client.where, str(error)) from None
        except NO_ANSWER as error:
            text, is_away = str(error), isinstance(error, OSError)
        # Look again: somebody else deleted or submitted it at the same moment, or the connection broke after it was
        # taken. And a cluster that has just started answers before its job agent does.
        passes = ("already exists", "does not exist", "non-terminal state", "No available agent")
        if not (is_away or any(mark in text for mark in passes)) or time.monotonic() > deadline:
            raise ConfigError(
                f"the job was refused: {_last_line(text)}",
                allowed="a job that the cluster can start",
                action="correct what the message names",
            )
        time.sleep(POLL_SECONDS)


def _submit(client: JobServer, request: JobRequest) -> None:
    client.submit_job(
        entrypoint=request.entrypoint,
        submission_id=request.submission_id,
        runtime_env=request.runtime_env(),
        entrypoint_num_cpus=request.num_cpus,
        metadata={"run_name": request.name, "settings_digest": request.settings_digest},
    )


def _leave_room(client: JobServer, request: JobRequest, say: Say) -> JobRequest:
    """Without the driver's cores where the ranks need all that there are: they would wait for them for ever."""
    have = client.cluster_num_cpus() if request.num_cpus and request.ranks_num_cpus else None
    if have is None or not request.ranks_num_cpus <= have < request.ranks_num_cpus + request.num_cpus:
        return request
    say(f"the ranks need {request.ranks_num_cpus:g} of the cluster's {have:g} cores: the driver reserves none")
    return replace(request, num_cpus=0.0)


def _require_same(request: JobRequest, known: JobDetails) -> None:
    digest = (known.metadata or {}).get("settings_digest", "")
    is_same = digest == request.settings_digest if digest else known.entrypoint == request.entrypoint
    if not is_same:
        raise ConfigError(
            f"{request.name} is {known.status.value} as {known.submission_id} with other settings: {known.entrypoint}",
            allowed="one configuration, --set and --run-root for one name",
            action="give the settings of that job to follow it, end it with --stop, or choose another --name",
        )


def follow(client: JobServer, identity: str, write: Callable[[str], None], say: Say) -> int:
    """Copy the job's log to `write` until it ends; returns the driver's exit code.

    Args:
        client: the job server.
        identity: submission id.
        write: takes the log's text, each part once, whatever breaks in between.
        say: one line for the user.

    Raises:
        StageFailed: the job ended without an exit code (its node or supervisor died), or the job server stayed away.
    """
    log = _Log(client, identity, write)
    while True:
        outages, is_whole = client.num_outages, log.copy()
        details = client.patiently(lambda: client.get_job_info(identity), say)
        # A server that goes away closes the log as one that has sent all of it does: after an outage it is read again.
        is_whole = is_whole and client.num_outages == outages
        if details.status in ENDED and (is_whole or log.breaks > 2):
            break
        time.sleep(POLL_SECONDS)
    if details.status is JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status is JobStatus.STOPPED:
        return EXIT_PREEMPTED
    raise StageFailed(f"job {identity} ended without an exit code: {details.message}")


class _Log:
    """A job's log. Ray sends it from its beginning each time it is asked; what was written is left out."""

    def __init__(self, client: JobServer, identity: str, write: Callable[[str], None]) -> None:
        self._client = client
        self._identity = identity
        self._write = write
        self._num_written = 0
        self.breaks = 0

    def copy(self) -> bool:
        """Write what is new until the job ends; False when the connection broke, or fell silent, before."""
        is_whole = asyncio.run(self._copy())
        self.breaks = 0 if is_whole else self.breaks + 1
        return is_whole

    async def _copy(self) -> bool:
        position = 0
        parts = self._client.tail_job_logs(self._identity)
        while True:
            try:
                text = await asyncio.wait_for(anext(parts), SILENCE_SECONDS)
            except StopAsyncIteration:
                return True
            except NO_ANSWER:
                return False
            new = text[max(0, self._num_written - position) :]
            position += len(text)
            if new:
                self._write(new)
                self._num_written = position


def stop(client: JobServer, request: JobRequest, wait_seconds: float, say: Say) -> JobStatus | None:
    """Ask a job to checkpoint and leave; how it ended, or None when it has not within `wait_seconds`.

    Raises:
        ConfigError: there is no job of that name.
    """
    identity = request.submission_id
    known = client.find(identity, say)
    if known is None:
        jobs = [job for job in client.patiently(client.list_jobs, say) if job.status not in ENDED]
        names = sorted({(job.metadata or {}).get("run_name", "") for job in jobs} - {""})
        raise ConfigError(
            f"there is no job of the name {request.name!r} ({identity})",
            allowed=f"names that run: {', '.join(names) or 'none'}",
            action="give the --name that it was submitted with",
        )
    if known.status in ENDED:
        return JobStatus(known.status)
    client.patiently(lambda: client.stop_job(identity), say)
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        status = client.patiently(lambda: client.get_job_status(identity), say)
        if status in ENDED:
            return JobStatus(status)
        time.sleep(POLL_SECONDS)
    return None
