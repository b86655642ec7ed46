"""Hostile programs: none is graded right, none harms the machine or the programs after it.

Programs that could harm a machine without isolation begin with `GUARD`, which ends them where they
are not the first process of their own namespace.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selftaught.sandbox import Limits, Program, Result, Sandbox, missing
from selftaught.sandbox.landlock import version

if reasons := missing():
    pytest.skip(f"no namespaces: {reasons}", allow_module_level=True)

# the programs in CHEATS try to be graded right, and harm nothing: they run in both modes
GUARD = "import os\nif os.getpid() != 1 or os.path.exists('/proc/self'): raise SystemExit(3)\n"
LIMITS = Limits(seconds=2, wall_seconds=4, memory_bytes=256 * 2**20, file_bytes=2**20)
HONEST = Program("def f(x):\n    return x + 1", ("assert f(1) == 2", "assert f(-1) == 0"))
TESTS = ("assert f(1) == 2", "assert f([3]) == [4]", "assert f('a') == 'b'")
"""No program of this file passes them."""
NOT_RIGHT = ("wrong", "error", "time limit")

EQUAL = (
    "__eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n    __hash__ = None"
)
CHEATS = {
    "equal to everything": f"class A:\n    {EQUAL}\ndef f(x): return A()",
    "int equal to everything": f"class A(int):\n    {EQUAL}\ndef f(x): return A(7)",
    "str equal to everything": f"class A(str):\n    {EQUAL}\ndef f(x): return A('q')",
    "list equal to everything": f"class A(list):\n    {EQUAL}\ndef f(x): return A([9])",
    "float equal to everything": f"class A(float):\n    {EQUAL}\ndef f(x): return A('nan')",
    "tuple equal to everything": f"class A(tuple):\n    {EQUAL}\ndef f(x): return A()",
    "dict equal to everything": f"class A(dict):\n    {EQUAL}\ndef f(x): return A()",
    "false class": f"class A:\n    {EQUAL}\n    __class__ = property(lambda s: int)\ndef f(x): return A()",
    "entry is an object": f"class A:\n    {EQUAL}\n    __call__ = lambda s, x: s\nf = A()",
    "metaclass": f"class M(type):\n    {EQUAL}\nclass A(metaclass=M): pass\ndef f(x): return A",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "mock": "from unittest.mock import MagicMock\nf = MagicMock()",
    "assertion error replaced": "import builtins\nclass A(BaseException): pass\nbuiltins.AssertionError = A\ndef f(x): return 0",
    "builtins replaced": "import builtins\nfor n in 'all any len abs isinstance sum sorted min max int str list eval exec compile'.split():\n    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 0",
    "isclose replaced": "import sys, math\nsys.modules['math'].isclose = lambda *a, **k: True\ndef f(x): return 0",
    "trace": "import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "json replaced": "import json\njson.dumps = lambda *a, **k: '[\"right\",\"\",null]'\ndef f(x): return 0",
    "encoder replaced": "import selftaught.sandbox.values as v\nv.Encoder.value = lambda s, x, d=0: 2\ndef f(x): return 0",
    "judge replaced": "import selftaught.sandbox.judge as j, selftaught.sandbox.remote as r\nj._run = lambda *a: None\nr.finish = lambda *a: None\ndef f(x): return 0",
    "finish called": "import selftaught.sandbox.remote as r\n[r.finish(n, 'right', '', None) for n in range(3, 5)]\ndef f(x): return 0",
    "sys.exit at import": "import sys\nsys.exit(0)",
    "os._exit at import": "import os\nos._exit(0)",
    "SystemExit in a call": "def f(x): raise SystemExit(0)",
    "os._exit in a call": "import os\ndef f(x): os._exit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "StopIteration": "def f(x): raise StopIteration",
    "closed descriptors": "import os\nos.closerange(0, 100)\ndef f(x): return 2",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0",
    "repr raises": "class A:\n    def __repr__(s): raise ValueError\ndef f(x): return A()",
    "str raises": "class E(Exception):\n    def __str__(s): raise SystemExit\n    __repr__ = __str__\ndef f(x): raise E()",
    "reduce": "class A:\n    def __reduce__(s): return (exec, ('import os; os._exit(0)',))\ndef f(x): return A()",
    "nested": "def f(x):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a",
    "circular": "def f(x):\n    a = []; a.append(a); return a",
    "circular tuple": "def f(x):\n    a = []; t = (a,); a.append(t); return t",
    "exponential": "def f(x):\n    t = (1,)\n    for _ in range(100): t = (t, t)\n    return t",
    "endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "huge int": "def f(x): return 1 << (1 << 29)",
    "huge string": "def f(x): return 'x' * (1 << 27)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "10 GB": "def f(x): return bytearray(10 * 2**30)",
    "crash": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "deep source": "f = " + "(" * 40_000 + ")" * 40_000,
    "deep operators": "f = " + "-" * 90_000 + "1",
    "replaced entry": "def f(x):\n    global f\n    f = lambda x: 2\n    return 0",
    "names of the tests": "check = candidate = METADATA = math = assert_ = lambda *a: True\ndef f(x): return 0",
    "shadowed builtins": "def sorted(*a): return True\nlen = abs = isinstance = all = any = sorted\ndef f(x): return 0",
    "frames": "import sys, gc\ndef f(x):\n    g = sys._getframe()\n    while g: g.f_locals.update(outcome='right'); g = g.f_back\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'outcome' in o: o['outcome'] = 'right'\n    return 0",
    "nan": "def f(x): return float('nan')",
    "True for 1": "def f(x): return True",
}  # fmt: skip
SLOW = {
    "endless loop": "def f(x):\n    while True: pass",
    "endless loop at import": "while True: pass",
    "endless repr": "class A:\n    def __repr__(s):\n        while True: pass\n    __str__ = __repr__\nclass E(Exception):\n    __str__ = A.__repr__\ndef f(x): raise E()",
    "ignored signals": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *a: None)\n    except (OSError, ValueError): pass\nclass A:\n    def __del__(s):\n        while True: pass\ndef f(x):\n    A()\n    while True: pass",
    "sleep": "import time\ndef f(x): time.sleep(1000)",
    "endless output": "import sys\ndef f(x):\n    while True: print('right' * 1000); sys.stderr.write('right' * 1000)",
    "huge power": "def f(x): return 7 ** 7 ** 9",
    "regular expression": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 40 + 'b')",
    "thread bomb": GUARD + "import threading\ndef g():\n    while True:\n        try: threading.Thread(target=g).start()\n        except RuntimeError: pass\ndef f(x):\n    g()",
    "fork bomb": GUARD + "def f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "messages to every descriptor": "import os, struct\nm = [b'[\"right\",\"\",null]\\n', b'{\"ready\": true}\\n', b'done\\n', b'late\\n', struct.pack('>I', 18) + b'[\"right\",\"\",null]\\n', struct.pack('>I', 14) + b'[\"value\",2,[]]', b'right\\n', b'\\xff' * 100]\ndef f(x):\n    for _ in range(20):\n        for n in range(1024):\n            for t in m:\n                try: os.write(n, t)\n                except OSError: pass\n    return 0",
    "a daemon": GUARD + "import time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(1000)\n        os._exit(0)\n    return 0",
}  # fmt: skip
EXITS_IN_TESTS = {
    "exit is not an exception": "import os\ndef f(x): os._exit(0)",
    "comparison is not an exception": "class A: pass\ndef f(x): return A()",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def weaker() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=1, isolation="process") as sandbox:
        yield sandbox


def descendants() -> set[int]:
    """The processes below this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def checked(sandbox: Sandbox, program: Program) -> Result:
    """Run a hostile program, then check that nothing is left of it and an honest one is right."""
    assert sandbox.run([HONEST]) == [Result("right")]
    before = descendants()
    (result,) = sandbox.run([program])
    assert descendants() <= before
    assert sandbox.run([HONEST]) == [Result("right")]
    assert len(result.detail) <= 300
    assert result.detail.isprintable()
    return result


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_is_right(sandbox: Sandbox, name: str):
    assert checked(sandbox, Program(CHEATS[name], TESTS)).outcome in NOT_RIGHT


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_is_right_in_the_weaker_mode(weaker: Sandbox, name: str):
    assert checked(weaker, Program(CHEATS[name], TESTS)).outcome in NOT_RIGHT


def test_the_weaker_mode_starts_no_processes_and_sends_no_signals(weaker: Sandbox, tmp_path: Path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    code = (
        f"caller, landlock, canary = {os.getpid()}, {version() >= 1}, {str(canary)!r}"
        + """
import os, socket
def attack():
    done = []
    calls = [os.fork, os.setsid, socket.socket, lambda: os.kill(os.getppid(), 0), lambda: os.kill(0, 0),
             lambda: os.killpg(os.getpgid(0), 0), lambda: os.execv('/bin/true', ['true']),
             lambda: open(f'/proc/{os.getppid()}/mem', 'rb')]
    for pid in (os.getppid(), caller):
        calls += [lambda p=pid, n=n: open(f'/proc/{p}/fd/{n}', 'wb') for n in (0, 3, 4, 5, 6)]
    if landlock:
        calls += [lambda: open('/etc/passwd'), lambda: os.listdir('/'), lambda: open(canary, 'r+'),
                  lambda: os.unlink(canary), lambda: os.kill(caller, 0)]
    open('mine', 'w').write('allowed')
    for number, call in enumerate(calls):
        try: done.append((number, call()))
        except (PermissionError, FileNotFoundError): pass
    return done + sorted(set(os.environ) - {'TMPDIR', 'HOME', 'LANG'})
"""
    )
    assert checked(weaker, Program(code, ("assert attack() == [], attack()",))) == Result("right")
    assert canary.read_text() == "alive"


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_no_endless_program_is_right(sandbox: Sandbox, name: str):
    assert checked(sandbox, Program(SLOW[name], TESTS)).outcome in NOT_RIGHT


@pytest.mark.parametrize("name", EXITS_IN_TESTS)
def test_a_test_cannot_catch_what_the_program_does_to_its_process(sandbox: Sandbox, name: str):
    test = "try:\n    f(1) == 2\nexcept BaseException:\n    pass"
    assert checked(sandbox, Program(EXITS_IN_TESTS[name], (test,))).outcome == "error"


def test_a_program_cannot_end_a_loop_of_the_tests_early(sandbox: Sandbox):
    program = Program("def f(x): raise StopIteration", ("assert all(map(f, [1, 2]))",))
    assert checked(sandbox, program).outcome == "error"


def attack(sandbox: Sandbox, body: str) -> Result:
    """Run a program whose function `attack` returns what succeeded. Right: nothing did."""
    code = (
        GUARD
        + "def attack():\n    done = []\n"
        + "\n".join(f"    {line}" for line in body.splitlines())
    )
    return checked(
        sandbox, Program(code + "\n    return done", ("assert attack() == [], attack()",))
    )


def test_files_of_the_machine_cannot_be_read(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    paths = [
        str(secret), __file__, "/proc/1/environ", "/proc/self/environ", f"/proc/{os.getpid()}/environ",
        f"/proc/{os.getppid()}/maps", "/etc/passwd", "/etc/shadow", "/sys/kernel", "/dev/mem", "/dev/vda",
        str(Path.home() / ".ssh"), str(Path.home() / ".bashrc"), "/home", "/var", "/run", "/bin/sh",
        str(Path.cwd()), "/.dockerenv", "/../../../etc/passwd",
    ]  # fmt: skip
    body = f"""
for path in {paths!r}:
    try:
        open(path).read(); done.append(path)
    except IsADirectoryError:
        done.append(path)
    except OSError:
        pass
    if os.path.exists(path): done.append('exists ' + path)"""
    assert attack(sandbox, body) == Result("right")


def test_the_environment_and_descriptors_are_hidden(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("API_KEY", "s3cret")
    body = """
if set(os.environ) - {'TMPDIR', 'HOME', 'LANG'}: done.append(dict(os.environ))
for number in range(1024):
    try: os.fstat(number)
    except OSError: continue
    if number > 4: done.append(number)
if os.read(0, 1): done.append('input')"""
    with Sandbox(LIMITS, workers=1) as fresh:
        assert attack(fresh, body) == Result("right")


@pytest.mark.slow
def test_files_of_the_machine_cannot_be_changed(tmp_path: Path):
    canary = tmp_path / "home" / "canary"
    canary.parent.mkdir()
    canary.write_text("alive")
    body = f"""
import shutil
for root in ({str(tmp_path)!r}, '/'):
    shutil.rmtree(root, ignore_errors=True)
for path in ({str(canary)!r}, '/usr/x', '/lib/x', '/x', '/dev/x', os.__file__):
    try: open(path, 'w').write('dead'); done.append(path)
    except OSError: pass
open('/tmp/mine', 'w').write('allowed')"""
    with Sandbox(Limits(seconds=60), workers=1) as sandbox:  # the walk over all files takes long
        assert attack(sandbox, body) == Result("right")
    assert canary.read_text() == "alive"
    assert Path(os.__file__).stat().st_size > 1000


def test_files_are_gone_for_the_next_program_and_the_disk_is_limited(sandbox: Sandbox):
    body = """
if os.listdir('/tmp'): done.append(os.listdir('/tmp'))
total = 0
for number in range(2000):
    try:
        with open(f'/tmp/{number}', 'wb') as file:
            total += file.write(bytes(2**16))
    except OSError: pass
if total > 3 * 2**20: done.append(total)"""
    assert attack(sandbox, body) == Result("right")
    assert attack(sandbox, body) == Result("right")


def test_the_network_cannot_be_reached(sandbox: Sandbox):
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind("\0selftaught-test")
        unix.listen()
        body = f"""
import socket
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_STREAM, {tcp.getsockname()!r}),
    (socket.AF_INET, socket.SOCK_DGRAM, {tcp.getsockname()!r}),
    (socket.AF_UNIX, socket.SOCK_STREAM, {chr(0) + "selftaught-test"!r}),
    (socket.AF_INET6, socket.SOCK_STREAM, ('::1', 80)), (socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)),
):
    try: socket.socket(family, kind).connect(address); done.append(str(family))
    except PermissionError: pass
try: socket.socketpair(); done.append('pair')
except PermissionError: pass"""
        assert attack(sandbox, body.replace("\0", "\\0")) == Result("right")


def test_processes_of_the_machine_get_no_signals(sandbox: Sandbox):
    body = f"""
for pid in (-1, os.getppid(), {os.getpid()}, {os.getppid()}, *range(2, 100)):
    if pid == 0: continue
    try: os.kill(pid, 9); done.append(pid)
    except OSError: pass"""
    assert attack(sandbox, body) == Result("right")


def test_dangerous_system_calls_are_denied(sandbox: Sandbox):
    body = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
calls = dict(ptrace=101, process_vm_readv=310, mount=165, umount2=166, pivot_root=155, unshare=272,
    setns=308, bpf=321, perf_event_open=298, keyctl=250, add_key=248, kexec_load=246, reboot=169,
    io_uring_setup=425, userfaultfd=323, open_by_handle_at=304, init_module=175, memfd_create=319,
    execve=59, shmget=29, x32_getpid=0x40000000 + 39, x32_write=0x40000001)
if os.uname().machine == 'x86_64':
    for name, number in calls.items():
        result = libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0)
        if result != -1 or ctypes.get_errno() != errno.EPERM: done.append((name, result, ctypes.get_errno()))
    if libc.syscall(ctypes.c_long(56), ctypes.c_ulong(0x10000000 | 17), 0, 0, 0, 0) != -1: done.append('clone')
for call in (lambda: os.execv('/bin/sh', ['sh']), lambda: os.setuid(0), lambda: os.chroot('/tmp')):
    try: call(); done.append('call')
    except OSError: pass
if os.getuid() == 0: done.append('root')"""
    assert attack(sandbox, body) == Result("right")


def holds(pid: int, needle: bytes) -> bool:
    """Whether the writable memory of a process contains some bytes."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, rights, *_ = line.split()
            start, end = (int(edge, 16) for edge in area.split("-"))
            if rights.startswith("rw"):
                memory.seek(start)
                if needle in memory.read(end - start):
                    return True
    return False


@pytest.mark.skipif(os.geteuid() != 0, reason="reads the memory of other processes")
def test_only_the_test_process_has_the_tests_in_its_memory():
    tests = ("x = 'se' + 'cret_value_8231'", "assert f(0) == 0", "assert g() == x")
    needle = b"cret_value_8231"
    code = "import time\ndef f(x):\n    time.sleep(2)\n    return 0\ndef g(): return 1"
    with Sandbox(Limits(), workers=1) as sandbox:
        empty = descendants()
        thread = threading.Thread(target=lambda: sandbox.run([Program(code, tests)]))
        thread.start()
        time.sleep(1)
        below = descendants()
        assert len(below - empty) == 3  # the keeper, the test process and the program
        assert sum(holds(pid, needle) for pid in below) == 1
        thread.join()
        assert not any(holds(pid, needle) for pid in descendants())


@pytest.mark.slow
def test_nothing_is_left_when_the_caller_is_killed():
    code = (
        "from selftaught.sandbox import Program, Sandbox, Limits\n"
        "sandbox = Sandbox(Limits(seconds=60), workers=1)\nprint('ready', flush=True)\n"
        "sandbox.run([Program('import time\\ntime.sleep(100)', ('pass',))])"
    )
    before = descendants()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    caller = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert caller.stdout is not None
    with caller.stdout:
        assert caller.stdout.readline() == b"ready\n"
    time.sleep(1)
    below = descendants() - before - {caller.pid}
    assert len(below) >= 4
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_a_thread_that_ends_does_not_end_its_sandbox():
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(Sandbox(LIMITS, workers=1)))
    thread.start()
    thread.join()
    with made[0] as sandbox:
        assert sandbox.run([HONEST]) == [Result("right")]
