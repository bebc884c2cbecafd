"""What the command line settles before a verb runs: threads, and where it can run at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selectkd.cli import main
from selectkd.cli.answer import write_answer
from selectkd.cli.threads import processors, settle_threads
from selectkd.errors import ResourceError


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_is_asked_how_many_processors_it_grants(
    files: dict[str, str], granted: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processors(tmp_path) == granted


def test_idle_threads_sleep_and_what_the_user_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    room: dict[str, str] = {}
    settle_threads(room, cgroup=tmp_path)
    assert room == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}
    own = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7"}
    settle_threads(own, cgroup=tmp_path)
    assert own == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7"}
    free: dict[str, str] = {}
    settle_threads(free, cgroup=tmp_path / "none")
    assert free == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_windows_is_told_in_one_sentence_at_the_start() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import json, xxhash, signal\n"
        "from selectkd.cli import main; sys.platform = 'win32'; code = main(['train', 'x.yaml'])\n"
        "try:\n    import selectkd.data.durable\n"
        "except ImportError as error: print(error)\n"
        "sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "Linux and macOS" in ran.stderr
    assert "WSL" in ran.stdout


def test_libraries_write_nothing_among_our_lines_unless_they_are_asked_to() -> None:
    code = (
        "import os, sys, warnings; from selectkd.cli import main\n"
        "sys.argv = ['selectkd', *{flags}, '--version']; main(); warnings.warn('of a library', FutureWarning)\n"
        "print(os.environ.get('HF_HUB_DISABLE_PROGRESS_BARS'), os.environ.get('TRANSFORMERS_VERBOSITY'))"
    )
    room = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_HUB_DIS", "TRANSFORMERS_V"))
    }
    for flags, said, warned in (([], "1 error", False), (["--debug"], "None None", True)):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(flags=flags)],
            env=room,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.endswith(f"{said}\n") and ("of a library" in ran.stderr) is warned


def test_a_full_disk_is_told_with_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(
        ResourceError, match=r"/dev/full: No space left.*; 16 bytes are needed, [\d,]+ bytes are free"
    ):
        write_answer(full, {"kl": 0.5})

    def fills(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("selectkd.cli.app.app", fills)
    assert main(["train", "x"]) == 7
    assert "bytes are free" in capsys.readouterr().err
