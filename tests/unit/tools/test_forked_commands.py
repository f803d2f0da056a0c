"""A fork stands for a fresh interpreter: same calls, same result; and the supervisor sees all."""

import errno
import os
from pathlib import Path

import pytest

from tools.faults import forked
from tools.faults.scenes import SCENES, Scene, forked_once
from tools.faults.system_calls import Call, is_supported
from tools.faults.victims import Outcome, Supervision, Victim

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs user notifications of seccomp")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    forked_once()
    path = str(tmp_path_factory.mktemp("scene") / "commit")
    SCENES["commit"].prepare(path)
    return path


def run(template: str, directory: Path, victim: Victim) -> Outcome:
    victim.scene.copy(template, str(directory))
    return victim.run(str(directory))


def names_of(template: str, directory: Path, *, is_real: bool) -> list[str]:
    names: list[str] = []

    def judge(supervision: Supervision, call: Call) -> None:
        names.append(call.name)
        supervision.let_through(call)

    outcome = run(template, directory, Victim(SCENES["commit"], judge, is_real=is_real))
    assert outcome.code == 0, outcome.stderr
    return names


def test_a_fork_makes_the_calls_of_a_fresh_start(template: str, tmp_path: Path) -> None:
    forks = names_of(template, tmp_path / "fork", is_real=False)
    assert forks == names_of(template, tmp_path / "real", is_real=True)
    assert {"fsync", "rename", "pwrite64"} <= set(forks)


def test_a_kill_comes_before_the_call(template: str, tmp_path: Path) -> None:
    scene: Scene = SCENES["commit"]

    def judge(supervision: Supervision, call: Call) -> None:
        if call.is_write and call.path_of(call.arguments[0]).endswith(".log"):
            supervision.kill(call)
        else:
            supervision.let_through(call)

    outcome = run(template, tmp_path / "try", Victim(scene, judge))
    assert outcome.code == -9
    assert not scene.acknowledged(outcome.code, outcome.stdout)
    assert scene.verify(str(tmp_path / "try"), False) == []


def test_a_scene_that_lost_its_commit_is_told(template: str, tmp_path: Path) -> None:
    scene = SCENES["commit"]
    outcome = run(template, tmp_path / "try", Victim(scene))
    assert scene.acknowledged(outcome.code, outcome.stdout)
    packs = list((tmp_path / "try" / "near").glob("dots/*/packs/*.pack"))
    max(packs, key=os.path.getmtime).unlink()
    assert scene.verify(str(tmp_path / "try"), True) != []


def test_a_short_write_is_one(tmp_path: Path) -> None:
    """The call returns what was really written, and the program sees it."""
    seen: list[bool] = []

    def judge(supervision: Supervision, call: Call) -> None:
        if call.is_write and call.path_of(call.arguments[0]).endswith("/format.tmp") and not seen:
            seen.append(supervision.cut_short(call))
        elif call.name == "fsync" and seen and len(seen) == 1:
            seen.append(True)
            supervision.fail(call, errno.EIO)
        else:
            supervision.let_through(call)

    assert forked.in_fork(lambda: _written_under(judge, str(tmp_path / "format.tmp"))) == [
        "2 of 4",
        "EIO",
        "ab",
    ]


def _written_under(judge: object, path: str) -> list[str]:
    import socket

    from tools.faults.system_calls import MUTATING, be_supervised

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        be_supervised(theirs, MUTATING, all_opens=False)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        told = f"{os.write(fd, b'abcd')} of 4\n"
        try:
            os.fsync(fd)
        except OSError as error:
            told += errno.errorcode[error.errno or 0]
        os.write(writer, told.encode())
        os._exit(0)
    theirs.close()
    supervision = Supervision(judge, ours)  # type: ignore[arg-type]
    assert supervision.run(os.pidfd_open(pid), 20)
    os.waitpid(pid, 0)
    return [*os.read(reader, 100).decode().splitlines(), Path(path).read_text()]
