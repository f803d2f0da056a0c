"""What the machine refuses is no bug: descriptors, threads, memory, a database file."""

import errno
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dmsync.surfaces.cli.machine_refusals import machine_refusal


def raised(failure: Exception, cause: Exception | None = None) -> Exception:
    try:
        try:
            if cause is not None:
                raise cause
        finally:
            raise failure
    except Exception as exc:
        return exc


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (MemoryError(), "no-resources"),
        (OSError(errno.EMFILE, "Too many open files"), "no-resources"),
        (OSError(errno.ENFILE, "Too many open files"), "no-resources"),
        (RuntimeError("can't start new thread"), "no-resources"),
        (ValueError("Unable to compress: Allocation error : not enough memory"), "no-resources"),
        (OSError(errno.EIO, "Input/output error", "packs/x"), "storage"),
        (OSError(errno.ENOSPC, "No space left on device"), "no-space"),
    ],
)
def test_refusals_have_a_type(failure: Exception, code: str):
    refusal = machine_refusal(failure)
    assert refusal is not None and refusal.code == code


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("x"),
        RuntimeError("dictionary changed size during iteration"),
        OSError(errno.EBADF, "Bad file descriptor"),
        sqlite3.IntegrityError("UNIQUE constraint failed"),
    ],
)
def test_bugs_stay_bugs(failure: Exception):
    assert machine_refusal(failure) is None


def test_what_failed_first_counts():
    first = RuntimeError("can't start new thread")
    refusal = machine_refusal(
        raised(RuntimeError("cannot join thread before it is started"), first)
    )
    assert refusal is not None and refusal.code == "no-resources"


def test_a_database_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(sqlite3.OperationalError) as caught:
        sqlite3.connect(tmp_path / "no" / "such.sqlite")
    refusal = machine_refusal(caught.value)
    assert refusal is not None and refusal.code == "storage"


@pytest.mark.parametrize("count", [8, 10, 13])
def test_a_command_with_few_descriptors_says_so(tmp_path: Path, count: int):
    environment = {**os.environ, "DM_HOME": str(tmp_path / "store"), "DM_AUTHOR": "ada"}

    def dm(*arguments: str, descriptors: int = 1024) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dmsync", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors,) * 2),
        )

    poor = dm("init", "shop", descriptors=count)
    assert "bug in dm" not in poor.stderr
    again = dm("init", "shop")
    assert again.returncode == 0 or "exists already" in again.stderr
    assert dm("commit", "-m", "first").returncode == 0
    assert dm("fsck", "--full").returncode == 0
