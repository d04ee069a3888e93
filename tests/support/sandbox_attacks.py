"""Programs that try to get out of the sandbox, or to exhaust the machine. Each prints ESCAPED where it succeeds.

Standard library alone, so that another Python (another user's) can run the suite from a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

_SYSCALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    return result, ctypes.get_errno()
"""


@dataclass(frozen=True)
class Attack:
    """A program, the ways in which it may end, and whether it is harmless enough to try outside (positive control)."""

    source: str
    statuses: tuple[str, ...] = ("ok", "error")
    works_outside: bool = False


ATTACKS: dict[str, Attack] = {
    "reads the shadow file": Attack("print('ESCAPED', open('/etc/shadow').read()[:9])", works_outside=True),
    "reads the user table": Attack("print('ESCAPED', open('/etc/passwd').read()[:9])", works_outside=True),
    "reads the evaluator's code": Attack("print('ESCAPED', len(open({evaluator!r}).read()))", works_outside=True),
    "lists home folders": Attack(
        "import os\nseen = [n for n in os.listdir({home!r}) if n not in {known!r}]\nprint('ESCAPED' if seen else '', seen)",
        works_outside=True,
    ),
    "reads the environment": Attack(
        "import os\nprint('ESCAPED' if {secret!r} in str(os.environ) + open('/proc/self/environ').read() else '')",
        works_outside=True,
    ),
    "sees host processes": Attack(
        "import os\npids = [p for p in os.listdir('/proc') if p.isdigit()]\nprint('ESCAPED' if len(pids) > 4 else '', pids)",
        works_outside=True,
    ),
    "kills every process": Attack("import os\nos.kill(-1, 9)\nos.kill(1, 9)\nprint('done')"),
    "kills the evaluator": Attack("import os\nos.kill({evaluator_pid}, 0)\nprint('ESCAPED')", works_outside=True),
    "opens an internet socket": Attack(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_STREAM)\nprint('ESCAPED')", works_outside=True
    ),
    "opens an internet 6 socket": Attack(
        "import socket\nsocket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\nprint('ESCAPED')"
    ),
    "connects to the host's loopback": Attack(
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('ESCAPED')", works_outside=True
    ),
    "opens a netlink socket": Attack("import socket\nsocket.socket(socket.AF_NETLINK, 3, 0)\nprint('ESCAPED')"),
    "opens a packet socket": Attack("import socket\nsocket.socket(17, 3, 0)\nprint('ESCAPED')"),
    "connects to an abstract socket of the host": Attack(
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + {abstract!r})\nprint('ESCAPED')",
        works_outside=True,
    ),
    "writes to the root file system": Attack(
        "import os\nfor path in ('/x', '/usr/x', '/etc/x', '/dev/x', '/dev/shm/x', '/proc/x', '/lib/x'):\n"
        "    try:\n        open(path, 'w').write('x'); print('ESCAPED', path)\n    except OSError: pass"
    ),
    "changes its own Python": Attack("import os\nopen(os.__file__, 'a').write('#')\nprint('ESCAPED')"),
    "changes the program file": Attack("open('/program.py', 'w').write('x')\nprint('ESCAPED')"),
    "fills the temporary folder": Attack(
        "n = 0\ntry:\n    for i in range(1000):\n        with open(f'/tmp/{{i}}', 'wb') as s:\n"
        "            s.write(bytes(1 << 20))\n        n += 1\nexcept OSError as e:\n    print(e)\n"
        "print('ESCAPED' if n > 64 else '', n)"
    ),
    "writes one endless file": Attack(
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nn = 0\ntry:\n    with open('/tmp/a', 'wb') as s:\n"
        "        while n < 200:\n            s.write(bytes(1 << 20)); s.flush(); n += 1\nexcept OSError as e:\n    print(e)\n"
        "print('ESCAPED' if n > 64 else '', n)"
    ),
    "allocates four gigabytes": Attack("x = bytearray(4 << 30)\nprint('ESCAPED')"),
    "keeps memory in files without a name": Attack(
        _SYSCALL + "r, e = call(319, 0, 0)\nprint('ESCAPED' if r >= 0 or e != errno.EPERM else '', r, e)"
    ),
    "keeps memory in System V segments": Attack(
        _SYSCALL + "r, e = call(29, 0, 1 << 20, 0o1600)\nprint('ESCAPED' if r >= 0 else '', r, e)"
    ),
    "computes for ever": Attack("while True: pass", ("timeout", "error")),
    "sleeps for ever": Attack("import time\ntime.sleep(1000)\nprint('ESCAPED')", ("timeout",)),
    "ignores signals and sleeps": Attack(
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "time.sleep(1000)\nprint('ESCAPED')",
        ("timeout",),
    ),
    "bombs with forks": Attack(
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            time.sleep(30); os._exit(0)\n"
        "        n += 1\nexcept OSError as e:\n    print(e)\nprint('ESCAPED' if n > 100 else '', n)",
        ("ok", "error", "timeout"),
    ),
    "bombs with forks that never stop trying": Attack(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ("timeout", "error")
    ),
    "bombs with threads": Attack(
        "import threading, time\nn = 0\ntry:\n    while n < 500:\n        threading.Thread(target=time.sleep, args=(30,), "
        "daemon=True).start(); n += 1\nexcept RuntimeError as e:\n    print(e)\nprint('ESCAPED' if n > 100 else '', n)",
        ("ok", "error", "timeout"),
    ),
    "leaves a daemon behind": Attack(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
        "print('gone')",
        ("ok", "timeout"),
    ),
    "leaves a daemon with closed pipes behind": Attack(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    for fd in range(3): os.close(fd)\n    time.sleep(60)\n"
        "print('gone')",
        ("ok", "timeout"),
    ),
    "writes without end": Attack("import sys\nwhile True: sys.stdout.write('x' * 65536)", ("output_limit",)),
    "writes errors without end": Attack("import sys\nwhile True: sys.stderr.write('x' * 65536)", ("output_limit",)),
    "makes a user namespace": Attack(
        _SYSCALL + "r, e = call(272, 0x10000000)\nprint('ESCAPED' if r == 0 else '', r, e)"
    ),
    "clones into new namespaces": Attack(
        _SYSCALL + "import os\nr, e = call(56, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "if r == 0: os._exit(0)\nprint('ESCAPED' if r > 0 else '', r, e)"
    ),
    "uses clone3": Attack(_SYSCALL + "r, e = call(435, 0, 0)\nprint('ESCAPED' if e != errno.ENOSYS else '', r, e)"),
    "enters the namespaces of process 1": Attack(
        _SYSCALL + "import os\ntry:\n    fd = os.open('/proc/1/ns/mnt', os.O_RDONLY)\nexcept OSError:\n    fd = 0\n"
        "r, e = call(308, fd, 0)\nprint('ESCAPED' if r == 0 or e != errno.EPERM else '', r, e)"
    ),
    "traces a process": Attack(
        _SYSCALL + "r, e = call(101, 0, 0, 0, 0)\nprint('ESCAPED' if r == 0 else '', r, e)", works_outside=True
    ),
    "reads another process's memory": Attack(
        _SYSCALL + "r, e = call(310, 1, 0, 0, 0, 0, 0)\nprint('ESCAPED' if e != errno.EPERM else '', r, e)"
    ),
    "mounts": Attack(
        _SYSCALL + "s = ctypes.c_char_p(b'tmpfs')\nr = libc.mount(s, b'/tmp', s, 0, 0)\n"
        "print('ESCAPED' if r == 0 else '', ctypes.get_errno())"
    ),
    "changes its root": Attack("import os\nos.chroot('/tmp')\nprint('ESCAPED')"),
    "uses io_uring": Attack(_SYSCALL + "r, e = call(425, 1, 0)\nprint('ESCAPED' if e != errno.EPERM else '', r, e)"),
    "uses keyrings": Attack(
        _SYSCALL + "r, e = call(250, 0, -3, 1)\nprint('ESCAPED' if e != errno.EPERM else '', r, e)"
    ),
    "loads a kernel program": Attack(
        _SYSCALL + "r, e = call(321, 0, 0, 0)\nprint('ESCAPED' if e != errno.EPERM else '', r, e)"
    ),
    "becomes root": Attack(
        "import os\nfor f in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0)):\n"
        "    try:\n        f(); print('ESCAPED')\n    except OSError: pass"
    ),
    "raises its limits": Attack(
        "import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CPU, r.RLIMIT_FSIZE):\n"
        "    try:\n        r.setrlimit(k, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('ESCAPED')\n"
        "    except (ValueError, OSError): pass"
    ),
    "uses what the evaluator left open": Attack(
        "import os\nleft = [os.readlink(f'/proc/self/fd/{{n}}') for n in os.listdir('/proc/self/fd') if int(n) > 2]\n"
        "left = [p for p in left if not p.startswith('/proc')]\nprint('ESCAPED' if left else '', left)"
    ),
    "has capabilities": Attack(
        "caps = [l for l in open('/proc/self/status') if l.startswith(('CapEff', 'CapPrm', 'CapAmb'))]\n"
        "print('ESCAPED' if any(int(l.split()[1], 16) for l in caps) else '', caps)"
    ),
    "may gain privileges": Attack("print('' if 'NoNewPrivs:\\t1' in open('/proc/self/status').read() else 'ESCAPED')"),
    "presses the kernel's keys": Attack("open('/proc/sysrq-trigger', 'w').write('h')\nprint('ESCAPED')"),
    "changes kernel settings": Attack("open('/proc/sys/vm/swappiness', 'w').write('60')\nprint('ESCAPED')"),
    "reads disks": Attack(
        "import os\nfound = [n for n in os.listdir('/dev') if n.startswith(('sd', 'vd', 'nvme', 'mem', 'kmsg', 'loop'))]\n"
        "print('ESCAPED' if found else '', found)"
    ),
    "makes a device": Attack(
        "import os, stat\nos.mknod('/tmp/m', 0o666 | stat.S_IFCHR, os.makedev(1, 1))\nprint('ESCAPED')"
    ),
    "types into the terminal": Attack(
        "import fcntl\ntry:\n    fcntl.ioctl(open('/dev/tty'), 0x5412, b'x'); print('ESCAPED')\nexcept OSError as e: print(e)"
    ),
    "overflows the stack": Attack("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ("error", "timeout")),
    "opens too many files": Attack(
        "n = 0\nkept = []\ntry:\n    while n < 1000:\n        kept.append(open('/dev/null')); n += 1\nexcept OSError as e:\n"
        "    print(e)\nprint('ESCAPED' if n > 200 else '', n)"
    ),
    "crashes the interpreter": Attack("import ctypes\nctypes.string_at(0)", ("error",)),
}


def attack_sources(facts: dict) -> dict[str, str]:
    """Name -> program, with the host's facts (paths, port, process id) filled in."""
    sources = {}
    for name, attack in ATTACKS.items():
        is_template = "{{" in attack.source or any(f"{{{key}" in attack.source for key in facts)
        sources[name] = attack.source.format(**facts) if is_template else attack.source
    return sources
