"""A PostgreSQL server of its own for a test, by the binaries of the machine, as a user that is not root; absent ones skip."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_cluster import free_ports


def postgres_programs() -> Path:
    """Folder of initdb and postgres; skips where there is none."""
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed (psycopg[binary])")
    on_path = shutil.which("initdb")
    folders = [Path(on_path).parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for folder in reversed(folders):
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    pytest.skip("no PostgreSQL on this machine: apt-get install -y --no-install-recommends postgresql")


def _unprivileged() -> dict[str, Any]:
    """Arguments of subprocess that leave root, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


@dataclass(frozen=True)
class Postgres:
    """A running server.

    Attributes:
        uri: with its password.
        uri_without_password: for use with `password_file`.
        password_file: in the form of PGPASSFILE.
    """

    uri: str
    uri_without_password: str
    password_file: Path


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Make a database cluster in a temporary folder, serve it on loopback with password authentication, remove it."""
    programs, leaves_root = postgres_programs(), _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    password, port = secrets.token_hex(12), free_ports(1)[0]
    (folder / "password").write_text(password)
    passfile = folder / "pgpass"
    passfile.write_text(f"127.0.0.1:{port}:*:hsmn:{password}\n")
    for path in (folder, folder / "password"):
        if leaves_root:
            os.chown(path, leaves_root["user"], leaves_root["group"])
    passfile.chmod(0o600)
    command = [str(programs / "initdb"), "--pgdata", str(folder / "data"), "--username", "hsmn", "--no-sync"]
    command += ["--auth", "scram-sha-256", "--pwfile", str(folder / "password"), "--encoding", "UTF8", "--no-locale"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, **leaves_root)
    assert made.returncode == 0, made.stderr
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port)]
    command += ["-k", str(folder), "-c", "fsync=off"]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **leaves_root)
    uri = f"postgresql://hsmn:{password}@127.0.0.1:{port}/postgres"
    try:
        _wait(uri, server, folder / "log")
        yield Postgres(uri, uri.replace(f":{password}@", "@"), passfile)
    finally:
        server.send_signal(signal.SIGINT)  # fast shutdown: sessions are ended
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(uri: str, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(uri, connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
