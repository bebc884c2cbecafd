"""One process that locks itself in and then runs one program; a script of its own, which imports nothing of selectkd.

    python -I -S -B cell.py ROLE FD...        with a JSON job on stdin

Roles: ``probe`` locks and reports; ``answer`` runs a model's program and answers calls of its functions; ``test`` runs
the tests, whose calls go to the answering process. The tests never share a process with the program they test: what
comes back over the pipe is plain data, rebuilt here, so that an object equal to everything, a patched builtin, an early
exit or a forged line of output can only make an answer wrong. Linux alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import sys
import sysconfig
from typing import Any

NOBODY = 65534
MOST_BYTES = 1 << 20
"""Of one message between the two processes."""

NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x04000000
NO_NEW_PRIVS, PARENT_DEATH_SIGNAL, DUMPABLE = 38, 1, 4
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's numbers, the same on every architecture
READ = 1 << 2 | 1 << 3 | 1 << 0  # read a file, list a folder, map it as code

# What an interpreter needs to compute and to read its own library; everything else is answered with EPERM. No process,
# thread, socket, signal to others, mount, or change of a file's owner, name or mode is among them.
ALLOWED = """
    read readv pread64 write writev close fstat newfstatat stat lstat statx lseek open openat getdents64 readlink
    readlinkat access faccessat faccessat2 getcwd ioctl fcntl dup poll ppoll select pselect6 mmap munmap mremap
    mprotect madvise brk futex set_robust_list rseq rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack getrandom
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getpid getppid gettid
    getuid geteuid getgid getegid getgroups getrlimit sysinfo uname sched_yield sched_getaffinity restart_syscall
    exit exit_group membarrier
"""


def main() -> None:
    role, fds = sys.argv[1], [int(one) for one in sys.argv[2:]]
    job = json.loads(sys.stdin.buffer.read())
    kept = lock(job)
    missing = sorted(set(job["demand"]) - set(kept))
    if role == "probe":
        os.write(fds[0], json.dumps({"kept": kept, "leaks": leaks()}).encode())
    elif missing:
        os._exit(job["locked_out"])
    elif role == "answer":
        answer(job, *fds)
    else:
        test(job, *fds)


# ---------------------------------------------------------------- locking in


def lock(job: dict[str, Any]) -> list[str]:
    """Gives up everything that can be given up; what was, by name."""
    kept = ["rlimits"]
    for which, most in (
        (resource.RLIMIT_CPU, job["cpu_seconds"]), (resource.RLIMIT_AS, job["memory"]), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(which, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    readable = own_library()
    opened = [(os.open(path, os.O_PATH | os.O_CLOEXEC), path) for path in readable if os.path.exists(path)]
    root = os.getuid() == 0
    if root and readable_by_all(sysconfig.get_path("stdlib")):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        root = False
    libc.prctl(PARENT_DEATH_SIGNAL, 9, 0, 0, 0)
    libc.prctl(DUMPABLE, 0, 0, 0, 0)  # nobody of the same user reads this memory
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.unshare(NEW_USER | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS) == 0:
        child = os.fork()  # the first process of the new namespace: when it ends, so does all it began
        if child:
            os.closerange(3, 4096)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        libc.prctl(PARENT_DEATH_SIGNAL, 9, 0, 0, 0)
        kept.append("namespaces")
        root = False  # no user of the outer namespace is mapped, so none of its privileges is left
    if not root:
        kept.append("unprivileged")
    if landlock(libc, opened):
        kept.append("landlock")
    for handle, _ in opened:
        os.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    if seccomp():
        kept.append("seccomp")
    return kept


def readable_by_all(path: str) -> bool:
    """Whether any user may walk to ``path`` and read it."""
    above = [path]
    while above[-1] != "/":
        above.append(os.path.dirname(above[-1]))
    return all(os.stat(one).st_mode & 0o1 for one in above) and bool(os.stat(path).st_mode & 0o4)


def own_library() -> list[str]:
    """What the interpreter reads: its standard library without installed packages, and the system's shared objects."""
    standard = sysconfig.get_path("stdlib")
    inside = [os.path.join(standard, name) for name in os.listdir(standard) if not name.endswith("-packages")]
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    shared = [f"{root}/{triplet}" for root in ("/lib", "/usr/lib") if triplet] + ["/lib64", "/usr/lib64"]
    return [*inside, *shared, "/etc/ld.so.cache", "/dev/null", "/dev/urandom"]


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def landlock(libc: Any, opened: list[tuple[int, str]]) -> bool:
    """Reading below ``opened`` and nothing else on any file system; no TCP and no signal out where the kernel can."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13, 14, 15, 15, 16, 16)[min(version, 6) - 1]) - 1
    net, scope = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    asked = (ctypes.c_uint64 * 3)(files, net, scope)
    ruleset = libc.syscall(CREATE_RULESET, asked, 8 if version < 4 else 16 if version < 6 else 24, 0)
    if ruleset < 0:
        return False
    for handle, path in opened:
        wanted = READ if os.path.isdir(path) else READ & ~(1 << 3)
        rule = _Rule(wanted & files, handle)
        if libc.syscall(ADD_RULE, ruleset, 1, ctypes.byref(rule), 0) != 0:
            return False
    done = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def seccomp() -> bool:
    """Every system call but ALLOWED fails with EPERM; those of another architecture kill."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return False
    lib.seccomp_init.restype = ctypes.c_void_p
    filters = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(0x00050000 | errno.EPERM)))
    if not filters:
        return False
    for name in ALLOWED.split():
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0 and lib.seccomp_rule_add(filters, ctypes.c_uint32(0x7FFF0000), number, 0) != 0:
            return False
    return lib.seccomp_load(filters) == 0


def leaks() -> list[str]:
    """What can still be done that must not be."""
    found = []
    for name, attempt in (
        ("reads files", lambda: os.close(os.open("/etc/passwd", os.O_RDONLY))),
        ("writes files", lambda: os.close(os.open("/tmp/.selectkd-cell", os.O_WRONLY | os.O_CREAT, 0o600))),
        ("starts processes", lambda: os.fork() or os._exit(0)),
        ("opens sockets", _socket),
        ("signals others", lambda: os.kill(os.getppid(), 0)),
    ):
        try:
            attempt()
        except OSError:
            continue
        found.append(name)
    return found


def _socket() -> None:
    import socket

    socket.socket().close()


# ---------------------------------------------------------------- the two roles


def answer(job: dict[str, Any], requests: int, replies: int) -> None:
    """Runs the program, then answers {name, arguments} until the tests end. The end of a pipe is the end."""
    space: dict[str, Any] = {
        "__name__": "answer"
    }  # what a program does only when it is run itself is left out
    failure = None
    objects: list[Any] = []  # instances of the program's classes, which the tests know by their place here
    incoming = os.fdopen(requests, "rb")
    try:
        exec(compile(job["source"], "<answer>", "exec"), space)
    except BaseException as error:  # whatever it raises, exits included
        failure = type(error).__name__
    while line := incoming.readline(MOST_BYTES):
        call = json.loads(line)
        reply: dict[str, Any] = {"raised": failure}
        if failure is None:
            try:
                reply = answered(call, space, objects)
            except BaseException as error:
                reply = {"raised": type(error).__name__}
        text = json.dumps(reply).encode()
        os.write(replies, (text if len(text) < MOST_BYTES else b'{"raised": "OverflowError"}') + b"\n")


def answered(call: dict[str, Any], space: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    """The reply to a call of a function, a class, or an attribute of one of ``objects``."""
    wanted = call["name"]
    found = space[wanted] if call["of"] is None else getattr(objects[call["of"]], wanted)
    if call["args"] is None and not callable(found):
        return {"value": plain(found)}
    if call["args"] is None:
        return {"callable": True}
    value = found(*rebuilt(call["args"], objects), **rebuilt(call["kwargs"], objects))
    if isinstance(found, type):
        objects.append(value)
        return {"object": len(objects) - 1}
    return {"value": plain(value)}


class Distant:
    """In the tests, an instance of a class of the program: equal to itself alone; attributes are asked for."""

    def __init__(self, index: int, ask: Any) -> None:
        self.__dict__.update(_index=index, _ask=ask)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask(name, self._index, None, {})


def test(job: dict[str, Any], requests: int, replies: int, verdict: int) -> None:
    """Runs the tests with the answering process behind each name of ``job["names"]``; reports whether all held."""
    incoming = os.fdopen(replies, "rb")

    def ask(name: str, of: int | None, args: Any, kwargs: Any) -> Any:
        given = {
            "name": name,
            "of": of,
            "args": args if args is None else plain(args),
            "kwargs": plain(kwargs),
        }
        reply = sent(json.dumps(given).encode() + b"\n")
        if "value" in reply:
            return rebuilt(reply["value"])
        if "object" in reply:
            return Distant(int(reply["object"]), ask)
        if "callable" in reply:
            return behind(name, of)
        raise RuntimeError(f"the program raised {reply['raised']}")

    def behind(name: str, of: int | None = None) -> Any:
        return lambda *args, **kwargs: ask(name, of, args, kwargs)

    def sent(asked: bytes) -> dict[str, Any]:
        view = memoryview(asked)
        while view:
            view = view[os.write(requests, view) :]
        line = incoming.readline(MOST_BYTES + 1)
        if not line.endswith(b"\n"):
            raise EOFError("the program ended, or wrote too much")
        return json.loads(line)

    proxies = {name: behind(name) for name in job["names"]}
    space: dict[str, Any] = {"__name__": "__main__"}
    report: dict[str, Any] = {"passed": True, "why": ""}
    try:
        exec(compile(job["setup"], "<setup>", "exec"), space)
        space.update(proxies)
        exec(compile(job["tests"], "<tests>", "exec"), space)
    except BaseException as error:
        report = {"passed": False, "why": f"{type(error).__name__}: {error}"[:200]}
    os.write(verdict, json.dumps(report).encode())


def plain(value: Any) -> Any:
    """A value as JSON: [kind, content], nested; TypeError for what is no plain data."""
    if value is None or isinstance(value, bool):
        return ["c", value]
    if isinstance(value, int):
        return ["i", hex(int(value))]
    if isinstance(value, float):
        return ["f", float(value).hex()]
    if isinstance(value, complex):
        return ["z", [value.real.hex(), value.imag.hex()]]
    if isinstance(value, str):
        return ["s", str(value)]
    if isinstance(value, bytes | bytearray):
        return ["b", bytes(value).hex()]
    for kind, of in (("l", list), ("t", tuple), ("S", set), ("F", frozenset)):
        if isinstance(value, of):
            return [kind, [plain(one) for one in value]]
    if isinstance(value, Distant):
        return ["o", value._index]
    if isinstance(value, dict):
        return ["d", [[plain(key), plain(one)] for key, one in value.items()]]
    raise TypeError(f"{type(value).__name__} is no plain data")


def rebuilt(given: Any, objects: Any = ()) -> Any:
    """The value of ``plain``, of Python's own types and ``objects`` alone."""
    kind, content = given
    if kind == "o":
        return objects[content]
    if kind == "c" and (content is None or isinstance(content, bool)):
        return content
    if kind == "s" and isinstance(content, str):
        return content
    if kind == "i":
        return int(content, 16)
    if kind == "f":
        return float.fromhex(content)
    if kind == "z":
        return complex(*map(float.fromhex, content))
    if kind == "b":
        return bytes.fromhex(content)
    if kind == "d":
        return {rebuilt(key, objects): rebuilt(one, objects) for key, one in content}
    return {"l": list, "t": tuple, "S": set, "F": frozenset}[kind](rebuilt(one, objects) for one in content)


if __name__ == "__main__":
    main()
