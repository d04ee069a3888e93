"""The sandbox against the attacks, as root and as an unprivileged user; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hsmn_dist.evaluation import sandbox as sandbox_module
from hsmn_dist.evaluation.sandbox import Program, Sandbox, SandboxLimits
from hsmn_dist.foundation.errors import SandboxError
from tests.support.sandbox_attacks import ATTACKS, attack_sources

ROOT = Path(__file__).resolve().parents[2]
LIMITS = SandboxLimits(timeout_seconds=2.0, memory_bytes=256 * 2**20, output_bytes=1 << 18)
SECRET = "a-secret-word-of-the-host"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS, num_workers=2)
    except SandboxError as error:
        pytest.skip(f"no sandbox on this machine: {error.found}")


@pytest.fixture(scope="module")
def facts():
    """What an attacker would like to reach: a listening port, an abstract socket, this process, these files."""
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        name = f"hsmn-dist-test-{os.getpid()}"
        local.bind("\0" + name)
        local.listen()
        os.environ["HSMN_TEST_SECRET"] = SECRET
        home = Path(sys.base_prefix).parents[-2]
        yield {
            "evaluator": str(ROOT / "hsmn_dist" / "evaluation" / "sandbox.py"),
            "home": str(home),
            "known": [Path(sys.base_prefix).relative_to(home).parts[0]] if home != Path(sys.base_prefix) else [],
            "secret": SECRET,
            "evaluator_pid": os.getpid(),
            "port": server.getsockname()[1],
            "abstract": name,
        }
        del os.environ["HSMN_TEST_SECRET"]


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_attack_is_contained_and_the_evaluator_goes_on(sandbox, facts, name):
    outcome = sandbox.run(Program(attack_sources(facts)[name]))
    assert "ESCAPED" not in outcome.stdout, outcome
    assert "SyntaxError" not in outcome.stderr, outcome
    assert outcome.status in ATTACKS[name].statuses, outcome
    assert outcome.seconds < LIMITS.timeout_seconds + 2
    assert len(outcome.stdout) <= LIMITS.output_bytes
    assert sandbox.run(Program("print('well')")).stdout == "well\n"


@pytest.mark.parametrize("name", sorted(name for name, attack in ATTACKS.items() if attack.works_outside))
def test_the_attack_would_have_worked_outside(sandbox, facts, name):
    """Positive control: a harmless attack that fails everywhere would prove nothing."""
    if name == "reads the shadow file" and os.geteuid() != 0:
        pytest.skip("needs root")
    done = subprocess.run(
        [sys.executable, "-c", attack_sources(facts)[name]], capture_output=True, text=True, timeout=20, check=False
    )
    assert "ESCAPED" in done.stdout, done


def test_no_process_of_an_attack_is_left(sandbox):
    mark = f"left-behind-{os.getpid()}"
    source = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    open('/tmp/{mark}', 'w')\n    time.sleep(60)\nprint(1)"
    sandbox.run(Program(source))
    time.sleep(0.3)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert "/program.py" not in left.replace(" ".join(sys.argv), "")
    assert not [line for line in left.splitlines() if line.startswith("bwrap") and "--ro-bind-data" in line]


def test_programs_run_in_parallel_and_keep_their_order(sandbox):
    outcomes = sandbox.run_many([Program(f"import time\ntime.sleep(0.3)\nprint({index})") for index in range(4)])
    assert [outcome.stdout.strip() for outcome in outcomes] == ["0", "1", "2", "3"]
    assert all(outcome.status == "ok" for outcome in outcomes)


def test_standard_input_exit_status_and_streams_arrive(sandbox):
    source = "import sys\nprint(input())\nprint('bad', file=sys.stderr)\nsys.exit(7)"
    outcome = sandbox.run(Program(source, stdin="h\u00e9llo\nmore"))
    assert (outcome.status, outcome.exit_code) == ("error", 7)
    assert outcome.stdout == "h\u00e9llo\n"
    assert outcome.stderr.strip() == "bad"


def test_a_program_sees_the_standard_library_and_its_own_main(sandbox):
    source = (
        "import collections, heapq, itertools, json, math, re, decimal, random, sqlite3, threading\n"
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "print(__name__, P(3), len(open('/tmp/a', 'w').name))\nexit(0)"
    )
    outcome = sandbox.run(Program(source))
    assert outcome.stdout == "__main__ P(x=3) 6\n", outcome


def test_a_huge_input_and_a_huge_program_do_not_block(sandbox):
    outcome = sandbox.run(
        Program("import sys\nprint(len(sys.stdin.read()))\n" + "# x\n" * 200_000, stdin="y" * 3_000_000)
    )
    assert outcome.stdout.strip() == "3000000"


def test_a_program_costs_about_a_tenth_of_a_second(sandbox):
    began = time.perf_counter()
    for _ in range(5):
        sandbox.run(Program("pass"))
    # 0.1 s on a quiet machine; the bound only catches a sandbox that became slow by an order of magnitude.
    assert (time.perf_counter() - began) / 5 < 1.0


def test_threads_of_the_evaluator_may_share_one_sandbox(sandbox):
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(sandbox.run(Program(f"print({n})")).stdout))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"{n}\n" for n in range(6)]


def test_without_bubblewrap_it_refuses_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    with pytest.raises(SandboxError) as caught:
        Sandbox()
    assert "apt-get install -y bubblewrap" in caught.value.action


def test_without_seccomp_it_refuses_and_says_what_to_install(monkeypatch):
    def absent(name):
        raise OSError("libseccomp.so.2: cannot open shared object file")

    monkeypatch.setattr(sandbox_module, "require", absent)
    with pytest.raises(SandboxError) as caught:
        sandbox_module.seccomp_filter()
    assert "libseccomp2" in caught.value.action


def test_a_kernel_that_refuses_namespaces_is_found_out_by_the_trial(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: str(fake))
    with pytest.raises(SandboxError, match="No permissions to create a new namespace"):
        Sandbox()


RUN_ALL = """
import json, sys
from pathlib import Path
from hsmn_dist.evaluation.sandbox import Program, Sandbox, SandboxLimits
from sandbox_attacks import attack_sources
facts = json.loads(sys.argv[1])
sandbox = Sandbox(SandboxLimits(timeout_seconds=2.0, memory_bytes=256 * 2**20, output_bytes=1 << 18), 2, Path(sys.argv[2]))
sources = attack_sources(facts)
outcomes = sandbox.run_many([Program(source) for source in sources.values()])
print(json.dumps({n: [o.status, o.stdout[:300], o.stderr[-300:]] for n, o in zip(sources, outcomes)}))
"""


def test_an_unprivileged_user_contains_every_attack_too(sandbox, facts, tmp_path_factory):
    python = Path("/usr/bin/python3").resolve()
    if os.geteuid() != 0 or not python.is_file():
        pytest.skip("needs root, to become another user, and a Python that this user may read")
    folder = Path("/tmp") / f"sandbox-as-nobody-{os.getpid()}"
    package = folder / "hsmn_dist"
    try:
        shutil.copytree(ROOT / "hsmn_dist" / "foundation", package / "foundation")
        (package / "evaluation").mkdir()
        for part in ("__init__.py", "evaluation/__init__.py", "evaluation/sandbox.py"):
            shutil.copy(ROOT / "hsmn_dist" / part, package / part)
        pyseccomp = pytest.importorskip("pyseccomp").__file__
        shutil.copy(pyseccomp, folder / "pyseccomp.py")
        shutil.copy(ROOT / "tests" / "support" / "sandbox_attacks.py", folder / "sandbox_attacks.py")
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        done = subprocess.run(
            [str(python), "-c", RUN_ALL, json.dumps({**facts, "home": "/root", "known": []}), str(python)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "HSMN_TEST_SECRET": SECRET},
            user=65534,
            group=65534,
            extra_groups=[],
            check=False,
        )
        if "SandboxError" in done.stderr:
            pytest.skip(f"this kernel lets no unprivileged user make a sandbox: {done.stderr[-300:]}")
        outcomes = json.loads(done.stdout)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert set(outcomes) == set(ATTACKS)
    for name, (status, stdout, stderr) in outcomes.items():
        assert "ESCAPED" not in stdout, (name, stdout)
        assert status in ATTACKS[name].statuses, (name, status, stdout, stderr)
