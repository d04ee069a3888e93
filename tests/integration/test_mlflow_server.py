"""The team's MLflow server, as cluster/mlflow/start.sh starts it: on PostgreSQL, with accounts, and its data after a restart."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("flask_wtf", reason="MLflow's accounts are not installed (mlflow[auth])")

from tests.support.postgres import postgres_server  # noqa: E402
from tests.support.ray_cluster import free_ports  # noqa: E402
from tests.support.whole_job import command_line, one_stage  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "cluster" / "mlflow" / "start.sh"


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """What the script reads; nothing of the tester's own MLflow settings."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**plain, "PATH": path, "MLFLOW_HOME": str(folder), "MLFLOW_WORKERS": "1", **changes}


@pytest.mark.parametrize(
    ("password", "problem"),
    [
        (None, "MLFLOW_ADMIN_PASSWORD_FILE must name a readable file"),
        ("", "0 characters"),
        ("short", "5 characters"),
        ("password1234", "another administrator password"),
        ("first-line-long\nadmin_username = other", "more than one line"),
    ],
)
def test_the_server_does_not_start_without_a_password_of_its_own(
    password: str | None, problem: str, tmp_path: Path
) -> None:
    changes = {}
    if password is not None:
        (tmp_path / "password").write_text(password)
        changes["MLFLOW_ADMIN_PASSWORD_FILE"] = str(tmp_path / "password")
    done = subprocess.run(
        ["bash", str(START)], env=environment(tmp_path, **changes), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert problem in done.stderr
    assert not password or password not in done.stderr
    assert not (tmp_path / "basic_auth.ini").exists()


@dataclass(frozen=True)
class Team:
    """The running server and its administrator."""

    uri: str
    password: str
    folder: Path


@contextlib.contextmanager
def serving(folder: Path, database_uri: str, port: int, password: str) -> Iterator[Team]:
    """Start the script, wait until it answers, end its process group."""
    for name, text in (("password", password), ("backend", database_uri)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    changes = {
        "MLFLOW_ADMIN_PASSWORD_FILE": str(folder / "password"),
        "MLFLOW_BACKEND_URI_FILE": str(folder / "backend"),
        "MLFLOW_PORT": str(port),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    home = folder / "home"
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(START)],
            env=environment(home, **changes),
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
        yield Team(f"http://127.0.0.1:{port}", password, home)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)


def commands_with(text: str) -> list[str]:
    """Command lines of this machine's processes that show a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace")
            found += [words] if text in words else []
    return found


def status(team: Team, user: str = "", password: str = "", host: str = "") -> int:
    """HTTP status of a search for experiments."""
    request = urllib.request.Request(f"{team.uri}/api/2.0/mlflow/experiments/search?max_results=5")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def ask(team: Team, user: str, password: str, method: str, path: str, /, **body: str) -> None:
    """One request of the users' interface, as cluster/README.md shows it with curl."""
    request = urllib.request.Request(
        f"{team.uri}/api/2.0/mlflow/users/{path}", json.dumps(body).encode(), method=method
    )
    request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def refused(team: Team, user: str, password: str, method: str, path: str, /, **body: str) -> bool:
    """Whether the users' interface says no."""
    try:
        ask(team, user, password, method, path, **body)
    except urllib.error.HTTPError as error:
        return error.code == 403
    return False


def metrics(team: Team, environment_: dict[str, str]) -> str:
    """What a client reads: one line a run."""
    code = (
        "import mlflow\n"
        f"client = mlflow.MlflowClient({team.uri!r})\n"
        "found = client.search_runs([client.get_experiment_by_name('hsmn_dist').experiment_id])\n"
        "for run in sorted(found, key=lambda run: run.data.tags['hsmn_dist.stage']):\n"
        "    points = client.get_metric_history(run.info.run_id, 'train/loss_nats')\n"
        "    files = [file.path for file in client.list_artifacts(run.info.run_id)]\n"
        "    print(run.data.tags['hsmn_dist.stage'], run.info.status, [(p.step, p.value) for p in points], files)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment_, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(1200)  # minutes on a machine with other work: every request goes through the accounts' database
def test_a_run_is_served_with_an_account_and_outlives_a_restart(tmp_path: Path) -> None:
    password, port = secrets.token_urlsafe(16), free_ports(1)[0]
    user, user_password = "trainer", secrets.token_urlsafe(16)
    with postgres_server() as database:
        with serving(tmp_path, database.uri, port, password) as team:
            assert status(team) == 401
            assert status(team, "admin", "password1234") == 401, "MLflow's default account"
            assert status(team, "admin", "wrong-wrong-wrong") == 401
            assert status(team, "admin", password) == 200
            assert status(team, "admin", password, host="evil.example") == 403
            for name in ("basic_auth.ini", "secret"):
                assert stat.S_IMODE((team.folder / name).stat().st_mode) == 0o600
            assert not commands_with(password) and not commands_with(database.uri)
            ask(team, "admin", password, "POST", "create", username=user, password=user_password)
            assert refused(team, user, user_password, "POST", "create", username="another", password=user_password)
            account = environment(tmp_path, MLFLOW_TRACKING_USERNAME=user, MLFLOW_TRACKING_PASSWORD=user_password)
            run_root = tmp_path / "runs"
            # Without the registered model, whose hundred files are another test's.
            changes = [
                "tracking.backend=mlflow",
                "tracking.registered_model=''",
                f"tracking.uri={team.uri}",
                f"run_root={run_root}",
            ]
            config = one_stage(tmp_path, *changes, "cluster.ranks_per_node=1", "tracking.finish_timeout_seconds=600")
            command = command_line("run", str(config), "--quiet", "--launcher", "inline")
            done = subprocess.run(command, env=account, cwd=ROOT, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
            before = metrics(team, account)
            assert before.count("FINISHED") >= 2 and "figures" in before
        with serving(tmp_path, database.uri, port, password) as team:
            assert status(team) == 401
            assert metrics(team, account) == before
    written = [path for path in run_root.rglob("*") if path.is_file() and path.stat().st_size < 2**20]
    known = [password, user_password]
    contents = [path.read_bytes() for path in written]
    told = done.stdout + done.stderr + (tmp_path / "log").read_text()
    assert contents and not any(word.encode() in content for word in known for content in contents)
    assert not any(word in told for word in known)


def test_percent_signs_are_taken_as_they_are_and_the_administrators_password_can_be_rotated(tmp_path: Path) -> None:
    database_password, password = f"p@ss/w:{secrets.token_hex(8)}%41", f"100%{secrets.token_hex(8)}%(here)s%%"
    new_password = secrets.token_urlsafe(16)
    encoded = urllib.parse.quote(database_password, safe="")
    assert encoded.startswith("p%40ss%2Fw%3A")
    with postgres_server() as database:
        psycopg = pytest.importorskip("psycopg")
        with psycopg.connect(database.uri, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE tracker LOGIN SUPERUSER PASSWORD '{database_password}'")
        address = database.uri_without_password.replace("hsmn@", f"tracker:{encoded}@")
        with serving(tmp_path, address, free_ports(1)[0], password) as team:
            assert status(team, "admin", password) == 200
            assert status(team, "admin", password.replace("%%", "%")) == 401
            words = {"username": "admin", "password": new_password, "current_password": password}
            ask(team, "admin", password, "PATCH", "update-password", **words)
            assert status(team, "admin", password) == 401 and status(team, "admin", new_password) == 200
        # The old password's file is still there: it makes an account, and changes none.
        with serving(tmp_path, address, free_ports(1)[0], password) as team:
            assert status(team, "admin", password) == 401 and status(team, "admin", new_password) == 200
        with psycopg.connect(database.uri) as connection:
            rows = connection.execute("SELECT username FROM users").fetchall()
    assert rows == [("admin",)]
    told = (tmp_path / "log").read_text()
    assert not any(word in told for word in (database_password, encoded, password, new_password))
