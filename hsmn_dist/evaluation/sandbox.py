"""Sandbox: run model-written Python in bubblewrap + seccomp + resource limits.

Off by default; a code benchmark runs only when `evaluation.runs_model_code` is set. Where bubblewrap or libseccomp is
absent, or the kernel refuses, the sandbox refuses too and says what to install; there is no weaker mode.

What it stops (one test each, tests/integration/test_sandbox.py):
- reading the host: the root file system is an empty tmpfs with the Python installation and the C libraries read-only;
  host files, home folders, /etc, environment variables and other processes are not there;
- writing: only a private /tmp of `disk_bytes` can be written; it is gone afterwards; memfd and System V memory are refused;
- the network: an own network namespace without any interface that is up; only AF_UNIX sockets can be made;
- privileges: an unprivileged user id, no capabilities, no_new_privs; ptrace, mount, new namespaces, io_uring, bpf, keyrings
  and modules are refused by seccomp;
- exhaustion: time (wall and processor), memory of a process, number of processes, open files, file size, and the captured
  output are capped; the process namespace dies whole, daemons included.

What it does not stop:
- a hole in the kernel, in bubblewrap or in libseccomp; for hostile code use a virtual machine of its own;
- heavy use of memory within the limits: `num_processes` times `memory_bytes` in the worst case, for `timeout_seconds`;
- side channels (timing, the host's processor model and memory size in /proc);
- a program that forges a passed test: tests run in the program's own process, so code that wants to can lie. Exiting
  early with status 0 does not pass (see `code_scoring`).

Unusual: a root evaluator starts bubblewrap without a user namespace and drops to a user id of its own inside, because the
kernel never limits the number of root's processes; any other user gets a user namespace.
"""

from __future__ import annotations

import errno
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Literal

from hsmn_dist.foundation.errors import MissingExtraError, SandboxError
from hsmn_dist.foundation.extras import require

_REFUSED_CALLS = (
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp perf_event_open userfaultfd bpf "
    "mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr "
    "unshare setns keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register "
    "init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff quotactl acct "
    "open_by_handle_at name_to_handle_at fanotify_init syslog settimeofday clock_settime adjtimex clock_adjtime "
    "sethostname setdomainname iopl ioperm lookup_dcookie move_pages migrate_pages mbind set_mempolicy "
    "memfd_create memfd_secret shmget shmat msgget semget mq_open vhangup personality"
)
_MUST_KNOW = ("ptrace", "mount", "unshare", "setns", "clone", "clone3", "io_uring_setup", "keyctl", "socket", "bpf")
_NAMESPACE_FLAGS = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_FIRST_UID, _NUM_UIDS = 60600, 500
_BLOCK_BYTES = 1 << 16
_KILL_GRACE_SECONDS = 2.0

# Runs inside, before the program: give up the user id (root evaluators only), then lower every limit for good.
_PRELUDE = """
import os, resource, sys
uid, memory, processes, disk, seconds = map(int, sys.argv[1:6])
if uid:
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
for name, value in (("AS", memory), ("NPROC", processes), ("FSIZE", disk), ("CPU", seconds), ("NOFILE", 64),
                    ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0), ("STACK", min(memory, 64 << 20))):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
sys.argv[:] = ["/program.py"]
with open("/program.py") as stream:
    code = compile(stream.read(), "/program.py", "exec")
del os, resource, sys, stream
exec(code, {"__name__": "__main__", "__file__": "/program.py", "__builtins__": __builtins__})
"""

RunStatus = Literal["ok", "error", "timeout", "output_limit"]


@dataclass(frozen=True)
class Program:
    """One Python program and what it reads from standard input."""

    source: str
    stdin: str = ""


@dataclass(frozen=True)
class RunOutcome:
    """What a program did. `ok` means exit status 0. Output beyond the cap is lost, and `output_limit` says so."""

    status: RunStatus
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program.

    Attributes:
        timeout_seconds: wall time, start of the interpreter included.
        memory_bytes: address space of one process.
        num_processes: processes and threads at one time.
        disk_bytes: size of /tmp, and of one file.
        output_bytes: captured standard output, and captured standard error.
    """

    timeout_seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    num_processes: int = 16
    disk_bytes: int = 16 * 2**20
    output_bytes: int = 1 << 20


class Sandbox:
    """Runs programs, `num_workers` at a time.

    Args:
        limits: of each program.
        num_workers: programs at the same time.
        interpreter: Python that runs the programs; its whole installation is visible to them, read-only.

    Raises:
        SandboxError: it cannot work on this machine; the message says what to install. Found out by a trial program.
    """

    def __init__(
        self, limits: SandboxLimits | None = None, num_workers: int = 2, interpreter: Path | None = None
    ) -> None:
        self.limits = limits or SandboxLimits()
        self.num_workers = num_workers
        self._is_root = os.geteuid() == 0
        self._bwrap = find_bubblewrap()
        self._filter = seccomp_filter()
        self._mounts = _python_mounts(interpreter or Path(os.path.realpath(sys.executable)))
        self._uids: SimpleQueue[int] = SimpleQueue()
        for slot in range(num_workers):
            # A user id per running program: root's children are counted by id, and programs must not share a count.
            self._uids.put(_FIRST_UID + (os.getpid() * num_workers + slot) % _NUM_UIDS if self._is_root else 0)
        trial = self.run(Program("print(6 * 7)"))
        if trial.status != "ok" or trial.stdout.strip() != "42":
            raise SandboxError(
                f"a trial program did not run in bubblewrap: {trial.status} {trial.stderr.strip()[:400]}",
                allowed="a kernel that lets this user make namespaces (kernel.unprivileged_userns_clone=1), or root",
                action="allow user namespaces, run as root in a container with CAP_SYS_ADMIN, or leave runs_model_code off",
            )

    def run(self, program: Program) -> RunOutcome:
        """Run one program to its end, its time limit or its output limit."""
        uid = self._uids.get()
        try:
            return self._run(program, uid)
        finally:
            self._uids.put(uid)

    def run_many(self, programs: Sequence[Program]) -> list[RunOutcome]:
        """Run programs in parallel; outcomes in their order."""
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="sandbox") as pool:
            return list(pool.map(self.run, programs))

    def _command(self, source_fd: int, filter_fd: int, uid: int) -> list[str]:
        limits = self.limits
        if self._is_root:
            privileges = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
            privileges += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            privileges = ["--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        command = [
            self._bwrap,
            *privileges,
            "--die-with-parent",
            "--new-session",
            "--clearenv",
            "--hostname",
            "sandbox",
        ]
        command += self._mounts.arguments
        command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/tmp"]
        command += ["--perms", "0444", "--ro-bind-data", str(source_fd), "/program.py"]
        command += [
            "--remount-ro",
            "/",
            "--chdir",
            "/tmp",
            "--setenv",
            "HOME",
            "/tmp",
            "--setenv",
            "PATH",
            "/usr/bin:/bin",
        ]
        command += ["--setenv", "PYTHONHASHSEED", "0", "--setenv", "LANG", "C.UTF-8", "--seccomp", str(filter_fd), "--"]
        command += [str(self._mounts.interpreter), "-I", "-B", "-X", "utf8", "-c", _PRELUDE]
        seconds = int(limits.timeout_seconds) + 1
        return command + [str(n) for n in (uid, limits.memory_bytes, limits.num_processes, limits.disk_bytes, seconds)]

    def _run(self, program: Program, uid: int) -> RunOutcome:
        began = time.monotonic()
        with ExitStack() as stack:
            source = stack.enter_context(_data_file(program.source.encode("utf-8", "replace")))
            rules = stack.enter_context(_data_file(self._filter))
            given = stack.enter_context(_data_file(program.stdin.encode("utf-8", "replace")))
            process = subprocess.Popen(
                self._command(source.fileno(), rules.fileno(), uid),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(source.fileno(), rules.fileno()),
                env={},
            )
            try:
                texts, stopped = _capture(process, began + self.limits.timeout_seconds, self.limits.output_bytes)
            finally:
                # bubblewrap's death takes the whole process namespace with it.
                process.kill()
                code = process.wait()
                for stream in (process.stdout, process.stderr):
                    if stream:
                        stream.close()
        status: RunStatus = stopped or ("ok" if code == 0 else "error")
        seconds = time.monotonic() - began
        return RunOutcome(status, None if stopped else code, texts[0], texts[1], seconds)


def find_bubblewrap() -> str:
    """Path of `bwrap`, or a `SandboxError` that says how to get it."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(
            "bubblewrap (bwrap) is not on this machine, so model-written code cannot be run safely",
            allowed="bubblewrap 0.5 or later",
            action="apt-get install -y bubblewrap libseccomp2 (or your distribution's packages), or leave runs_model_code off",
        )
    return found


def seccomp_filter() -> bytes:
    """The compiled filter (BPF): everything is allowed but the calls that reach beyond the sandbox."""
    try:
        seccomp: Any = require("pyseccomp")
    except (MissingExtraError, OSError, RuntimeError) as error:
        raise SandboxError(
            f"seccomp filters cannot be made here: {error}",
            allowed="the package pyseccomp and the library libseccomp 2.5 or later",
            action="apt-get install -y libseccomp2 && pip install -c constraints.txt 'hsmn_dist[eval]'",
        ) from error
    architecture = seccomp.system_arch()
    unknown = [name for name in _MUST_KNOW if not _is_known(seccomp, architecture, name)]
    if unknown:
        raise SandboxError(
            f"libseccomp does not know the calls {', '.join(unknown)}",
            allowed="libseccomp 2.5 or later",
            action="update libseccomp2, or leave runs_model_code off",
        )
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    denied = seccomp.ERRNO(errno.EPERM)
    for name in _REFUSED_CALLS.split():
        if _is_known(seccomp, architecture, name):
            rules.add_rule(denied, name)
    rules.add_rule(denied, "socket", seccomp.Arg(0, seccomp.NE, int(socket.AF_UNIX)))
    for flag in _NAMESPACE_FLAGS:
        rules.add_rule(denied, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    # clone3's flags lie in memory, where a filter cannot look; "not implemented" makes the C library use clone.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as stream:
        rules.export_bpf(stream)
        stream.seek(0)
        return stream.read()


def _is_known(seccomp: Any, architecture: Any, name: str) -> bool:
    try:
        return int(seccomp.resolve_syscall(architecture, name)) >= 0
    except (ValueError, RuntimeError, OSError):
        return False


@dataclass(frozen=True)
class _Mounts:
    arguments: list[str]
    interpreter: Path


def _python_mounts(interpreter: Path) -> _Mounts:
    """Read-only mounts of the interpreter's installation and of the C libraries; nothing else of the host."""
    base = Path(sys.base_prefix) if interpreter.resolve() == Path(sys.executable).resolve() else interpreter.parents[1]
    arguments: list[str] = []
    for top in ("/lib", "/lib32", "/lib64", "/bin"):
        path = Path(top)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), top]
        elif path.is_dir() and top != "/bin":
            arguments += ["--ro-bind", top, top]
    if base == Path("/usr"):
        binds = [base]
    else:
        binds = [*filter(Path.is_dir, (Path("/usr/lib"), Path("/usr/lib64"))), base]
    loader = [Path("/etc", name) for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives")]
    binds += [path for path in loader if path.exists()]
    parents = dict.fromkeys(parent for path in binds for parent in reversed(path.parents[:-1]))
    for parent in parents:
        # Folders that bubblewrap makes on its way are closed to all but root, which would shut the program out.
        arguments += ["--perms", "0755", "--dir", str(parent)]
    for path in binds:
        arguments += ["--ro-bind", str(path), str(path)]
    return _Mounts(arguments, interpreter)


@contextmanager
def _data_file(data: bytes) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as stream:
        stream.write(data)
        stream.flush()
        stream.seek(0)
        yield stream


def _capture(
    process: subprocess.Popen[bytes], deadline: float, cap: int
) -> tuple[tuple[str, str], Literal["timeout", "output_limit"] | None]:
    """Read both streams until they end, `deadline` (monotonic seconds), or `cap` bytes of either."""
    assert process.stdout and process.stderr
    kept: dict[int, bytearray] = {}
    stopped: Literal["timeout", "output_limit"] | None = None
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
            kept[stream.fileno()] = bytearray()
        while selector.get_map() and stopped is None:
            left = deadline - time.monotonic()
            if left <= 0:
                stopped = "timeout"
                break
            for key, _ in selector.select(min(left, 0.5)):
                block = os.read(key.fd, _BLOCK_BYTES)
                if not block:
                    selector.unregister(key.fileobj)
                    continue
                kept[key.fd] += block
                if len(kept[key.fd]) > cap:
                    stopped = "output_limit"
            # A daemon may hold the pipes open after the program itself has ended.
            if process.poll() is not None and time.monotonic() > deadline - _KILL_GRACE_SECONDS:
                break
    out, err = (bytes(data[:cap]).decode("utf-8", "replace") for data in kept.values())
    if stopped is None:
        try:
            process.wait(max(0.0, deadline - time.monotonic()) + 0.05)
        except subprocess.TimeoutExpired:
            stopped = "timeout"
    return (out, err), stopped
