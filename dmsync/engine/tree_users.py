"""Who is using a working tree: processes of this machine that have its files open for writing.

A tree must not be switched under a running database: it would go on writing into files that are
no longer its own. Found through /proc by path, so processes in containers that see the tree
elsewhere are not found here; and only root sees the processes of other users.
"""

import os
from typing import Final

from dmsync.core.values import plain_value_type
from dmsync.errors import WouldLose

_PROC: Final = b"/proc"
_SHARED_WRITABLE: Final = b"rw-s"


@plain_value_type
class TreeUser:
    """A process, its command name, and one file of the tree that it may write."""

    pid: int
    command: str
    path: bytes


def refuse_in_use(tree: bytes, *, insist: str = "--in-use") -> None:
    """Refuse to write into a tree that somebody else may be writing. `insist` is what does it all
    the same, empty where nothing does.

    Raises:
        WouldLose: naming the processes.
    """
    users = tree_users(tree)
    if users:
        named = ", ".join(f"{user.command} ({user.pid})" for user in users[:3])
        raise WouldLose(
            f"{len(users)} running processes have files of {os.fsdecode(tree)} open for writing: "
            f"{named}",
            hint="stop the service first"
            + (f"; {insist} switches the tree under it all the same" if insist else ""),
            processes=[user.pid for user in users],
        )


def tree_users(tree: bytes) -> list[TreeUser]:
    """Processes other than this one that may write files below `tree`, by process id."""
    below = os.path.realpath(tree) + b"/"
    users = []
    for name in os.listdir(_PROC):
        if name.isdigit() and int(name) != os.getpid():
            path = _written_file(os.path.join(_PROC, name), below)
            if path is not None:
                users.append(TreeUser(int(name), _command(name), path))
    return sorted(users, key=lambda user: user.pid)


def _written_file(process: bytes, below: bytes) -> bytes | None:
    """One file under `below` that the process has open for writing or mapped shared."""
    try:
        for number in os.listdir(os.path.join(process, b"fd")):
            path = os.readlink(os.path.join(process, b"fd", number))
            if path.startswith(below) and _is_writable(process, number):
                return path
        return _mapped_file(process, below)
    except OSError:
        return None  # it ended, or belongs to somebody else


def _is_writable(process: bytes, number: bytes) -> bool:
    with open(os.path.join(process, b"fdinfo", number), "rb") as file:
        for line in file:
            if line.startswith(b"flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _mapped_file(process: bytes, below: bytes) -> bytes | None:
    with open(os.path.join(process, b"maps"), "rb") as file:
        for line in file:
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[1] == _SHARED_WRITABLE and fields[5].startswith(below):
                return fields[5].rstrip(b"\n")
    return None


def _command(pid: bytes) -> str:
    try:
        with open(os.path.join(_PROC, pid, b"comm"), "rb") as file:
            return file.read(64).decode("utf-8", "replace").strip()
    except OSError:
        return "process"
