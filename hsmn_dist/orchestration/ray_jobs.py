"""Ray's job server: submit a run by name, follow its log, return its exit code. Token authentication, no environment needed.

Unusual: a submission id is made from the run's name, and Ray refuses a second job of the same id, so submitting twice follows the
first. The job's command is `hsmn-dist ensure`, whose lease keeps two drivers apart even where two job servers share a disk.
Measured with Ray 2.60: 401 without a token, 403 with a wrong one. Traffic is not encrypted: use a private network or a tunnel.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from hsmn_dist.foundation.errors import ConfigError, StageFailed

ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
CACHES = ["/.mypy_cache/", "/.pytest_cache/", "/.ruff_cache/", "__pycache__"]
EXCLUDES = ["/runs/", "/.venv/", "/.git/", "/mlruns/", "*.tar", "*.safetensors", *CACHES]
POLL_SECONDS = 1.0
EXIT_PREEMPTED = 75
AGENT_SECONDS = 90.0


@dataclass(frozen=True)
class JobRequest:
    """What is submitted.

    Attributes:
        name: of the run; decides the submission id.
        entrypoint: shell line that the head node runs.
        working_dir: folder that is uploaded; "" where every node's image has the program.
        pip_packages: what a bare node must install first.
        environment: variables of the job.
        num_cpus: cores that the driver itself reserves.
        grace_seconds: time between a stop and the kill.
    """

    name: str
    entrypoint: str
    working_dir: str = ""
    pip_packages: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    num_cpus: float = 0.0
    grace_seconds: float = 60.0

    @property
    def submission_id(self) -> str:
        """Equal for equal names; only characters that Ray takes."""
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", self.name)
        return f"hsmn-{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment."""
        wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(self.grace_seconds) + 30)}
        env: dict[str, Any] = {"env_vars": {**wait, **self.environment}}
        if self.working_dir:
            env |= {"working_dir": self.working_dir, "excludes": EXCLUDES}
        if self.pip_packages:
            env["pip"] = {"packages": list(self.pip_packages), "pip_check": False}
        return env


def connect(address: str, token_file: Path | None = None) -> JobSubmissionClient:
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
        client = JobSubmissionClient(address, headers=headers or None)
        client.list_jobs()
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
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


def submit(client: JobSubmissionClient, request: JobRequest, say: Callable[[str], None]) -> str:
    """Submit, or find the job of the same name; returns the submission id.

    A job of that name that ended is replaced, which resumes its run.
    """
    identity = request.submission_id
    known = {job.submission_id: job for job in client.list_jobs()}
    if identity in known and known[identity].status not in ENDED:
        say(f"{request.name} is {known[identity].status.value} as {identity}: following it")
        return identity
    if identity in known:
        say(f"{request.name} ended as {known[identity].status.value}: submitting it again")
        client.delete_job(identity)
    _submit(client, request, say)
    return identity


def _submit(client: JobSubmissionClient, request: JobRequest, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.submission_id,
                runtime_env=request.runtime_env(),
                entrypoint_num_cpus=request.num_cpus,
                metadata={"run_name": request.name},
            )
            say(f"submitted {request.submission_id}")
            return
        except RuntimeError as error:
            text = str(error)
        if "already exists" in text:
            say(f"{request.submission_id} was submitted by somebody else at the same moment: following it")
            return
        # A cluster that has just started answers before its job agent does.
        if "No available agent" not in text or time.monotonic() > deadline:
            raise ConfigError(
                f"the job was refused: {text.strip().splitlines()[-1][:300]}",
                allowed="a job that the cluster can start",
                action="correct what the message names",
            )
        time.sleep(POLL_SECONDS)


def follow(client: JobSubmissionClient, identity: str, write: Callable[[str], None]) -> int:
    """Copy the job's log to `write` until it ends; returns the driver's exit code.

    Raises:
        StageFailed: the job ended without an exit code (its node or supervisor died).
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(identity):
            write(text)

    while client.get_job_status(identity) not in ENDED:
        try:
            asyncio.run(tail())
        except (ConnectionError, RuntimeError, OSError):
            time.sleep(POLL_SECONDS)  # the job may not have started, or the connection broke: look again
        if client.get_job_status(identity) not in ENDED:
            time.sleep(POLL_SECONDS)
    details = client.get_job_info(identity)
    if details.status is JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status is JobStatus.STOPPED:
        return EXIT_PREEMPTED
    raise StageFailed(f"job {identity} ended without an exit code: {details.message}")


def stop(client: JobSubmissionClient, identity: str, wait_seconds: float) -> bool:
    """Ask a job to checkpoint and leave; True once it ended."""
    client.stop_job(identity)
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        if client.get_job_status(identity) in ENDED:
            return True
        time.sleep(POLL_SECONDS)
    return False
