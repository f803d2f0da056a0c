"""Runs `dm` in forks of this process: a try then costs no start of an interpreter.

A fork has everything imported and is otherwise what `python -m dmsync` is at the beginning of its
main: one thread, its own environment, arguments, standard streams and process group. A server that
it wants is forked too, by a process apart, the `Nursery`: of the client's open files, locks and
threads nothing goes into it. What equals a fresh start, and what does not, is tested in
tests/unit/tools/test_forked.py; harnesses try a part of their cases on the real thing as well.
"""

import asyncio
import gc
import importlib
import os
import pkgutil
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Never

from dmsync.engine.safe_files import die_with_parent

CHECKOUT: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
REAL_DM: Final = (sys.executable, "-P", "-m", "dmsync")
PATIENCE_S: Final = 120.0
_SLOW: Final = ("ssh_client", "ssh_server", "ssh_channel", "ssh_library", "server_host_key")
"""Modules that need asyncssh, which no local remote does."""
_LAZY: Final = (
    *("asyncio.subprocess", "concurrent.futures.thread", "encodings.idna"),
    *("difflib", "shutil", "tomllib"),
)
_TALKING: Final = ("push", "pull", "fetch", "clone")
_REQUEST_BYTES_MAX: Final = 4096

Hook = Callable[[], None]


@dataclass(frozen=True)
class Ran:
    """How a run of `dm` ended. `code` is negative for a signal, None when it did not end in time
    and was killed."""

    code: int | None
    stdout: bytes
    stderr: bytes

    @property
    def is_crash(self) -> bool:
        """Did it end by what a user must never see: a traceback, or an error without a type?"""
        return b"Traceback (most" in self.stderr or b"this is a bug in dm" in self.stderr

    def told(self) -> str:
        """One line for a failure."""
        words = (self.stderr or self.stdout).decode("utf-8", "replace").split("\n")
        return f"exit {self.code}: " + " | ".join(word for word in words if word)[-400:]


def import_everything() -> None:
    """Import all of the product that a command may import, so that no fork has to."""
    import dmsync

    threads = len(os.listdir("/proc/self/task"))  # a test's runner may have some
    for found in pkgutil.walk_packages(dmsync.__path__, "dmsync."):
        if not found.name.endswith(_SLOW) and not found.name.endswith("__main__"):
            with suppress(ImportError):  # a command that needs it says so itself
                importlib.import_module(found.name)
    for name in _LAZY:
        importlib.import_module(name)
    _import_without_numpy("sqlite_utils")
    assert len(os.listdir("/proc/self/task")) == threads, "a module has started threads"
    gc.freeze()


def _import_without_numpy(name: str) -> None:
    """numpy, used where it is there, would start threads, and no fork has those."""
    was_absent = "numpy" not in sys.modules
    if was_absent:
        sys.modules["numpy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    finally:
        if was_absent:
            del sys.modules["numpy"]


def run_dm(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    hook: Hook | None = None,
    server_hook: Hook | None = None,
    patience_s: float = PATIENCE_S,
) -> Ran:
    """Run `dm` in a fork to its end. `hook` is called in the fork before anything else,
    `server_hook` in the servers that it wants."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with Nursery(environment, server_hook) as nursery:
            pid = start_dm(
                arguments, environment, (out.fileno(), err.fileno()), nursery=nursery, hook=hook
            )
            code = wait_for(pid, patience_s)
        return Ran(code, _content(out.fileno()), _content(err.fileno()))


def start_dm(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    outputs: tuple[int, int],
    *,
    nursery: "Nursery | None" = None,
    hook: Hook | None = None,
) -> int:
    """Start `dm` in a fork, with stdout and stderr into descriptors; its process id, which is its
    process group's as well."""

    def prepare() -> None:
        os.setpgid(0, 0)
        if nursery is not None:
            nursery.serve_this_process()
        if hook is not None:
            hook()

    return _fork_dm(arguments, environment, (None, *outputs), prepare)


def wait_for(pid: int, patience_s: float) -> int | None:
    """The exit code (negative: the signal) of a child; None: it hung, and its group was killed."""
    pidfd = os.pidfd_open(pid)
    try:
        ready = select.poll()
        ready.register(pidfd, select.POLLIN)
        hung = not ready.poll(patience_s * 1000)
        if hung:
            kill_group(pid)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(pidfd)
    return None if hung else os.waitstatus_to_exitcode(status)


def kill_group(pid: int) -> None:
    """SIGKILL a process and its group, if they are still there."""
    for end in (os.killpg, os.kill):
        try:
            end(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _fork_dm(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[int | None, int, int],
    prepare: Hook,
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_dm(arguments, environment, streams, prepare)
    return pid


def _be_dm(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[int | None, int, int],
    prepare: Hook,
) -> Never:
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["dm", *arguments]
        _take_streams(streams)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as the interpreter does at its start
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        from dmsync.surfaces.cli.entry import main

        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _take_streams(streams: tuple[int | None, int, int]) -> None:
    source = streams[0] if streams[0] is not None else os.open(os.devnull, os.O_RDONLY)
    for target, given in enumerate((source, streams[1], streams[2])):
        os.dup2(given, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process runs
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


# --- servers -------------------------------------------------------------------------------------


class Nursery:
    """A process that forks servers for local remotes, so that clients do not have to.

    `hook` is called in each server before it begins. Context manager: when it ends all servers
    have ended, for want of a client, or were killed because they would not.
    """

    def __init__(self, environment: Mapping[str, str], hook: Hook | None = None) -> None:
        self._environment = dict(environment)
        self._hook = hook

    def __enter__(self) -> "Nursery":
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.setpgid(0, 0)
                die_with_parent()
                self._socket.close()
                self._run(theirs)
            finally:
                os._exit(0)
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        # What still runs sees its client gone and ends by itself; servers are of the group.
        wait_for(self._pid, PATIENCE_S)

    def serve_this_process(self) -> None:
        """From now on local remotes of this process (a fork of the one that made this) are served
        by forks of the nursery."""
        from dmsync.transports import local

        local.connect_local = partial(_connect_forked, self._socket)

    def _run(self, asked: socket.socket) -> None:
        poll = select.poll()
        poll.register(asked, select.POLLIN)
        running: dict[int, tuple[int, int]] = {}
        is_wanted = True
        while is_wanted or running:
            for fd, _ in poll.poll():
                if fd != asked.fileno():
                    poll.unregister(fd)
                    self._report(fd, *running.pop(fd))
                    continue
                request, fds, _, _ = socket.recv_fds(asked, _REQUEST_BYTES_MAX, 4)
                if not request:
                    poll.unregister(asked)
                    is_wanted = False
                    continue
                pid = self._start(request.decode(), fds, asked)
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (pid, fds[3])
                poll.register(pidfd, select.POLLIN)
                for given in fds[:3]:
                    os.close(given)

    def _start(self, home: str, fds: Sequence[int], asked: socket.socket) -> int:
        def prepare() -> None:
            asked.close()
            for fd in fds:
                os.close(fd)
            if self._hook is not None:
                self._hook()

        arguments = ["serve", "--stdio", "--home", home]
        return _fork_dm(arguments, self._environment, (fds[0], fds[1], fds[2]), prepare)

    def _report(self, pidfd: int, pid: int, status_fd: int) -> None:
        _, status = os.waitpid(pid, 0)
        try:
            os.write(status_fd, b"%d" % os.waitstatus_to_exitcode(status))
        except OSError:
            pass  # the client has gone
        os.close(pidfd)
        os.close(status_fd)


async def _connect_forked(nursery: socket.socket, url: Any) -> Any:
    """What connect_local does, but for who starts the server."""
    from dmsync.transports.child_process import ProcessStream, _wide_pipe
    from dmsync.transports.remote_command import failure_of_silent_end

    home = os.path.abspath(os.path.expanduser(url.path))
    their_source, target = _wide_pipe()
    source, their_target = _wide_pipe()
    messages, their_messages = os.pipe()
    status, their_status = os.pipe()
    theirs = [their_source, their_target, their_messages, their_status]
    socket.send_fds(nursery, [home.encode()], theirs)
    for fd in theirs:
        os.close(fd)
    process: Any = await _ForkedServer.start(messages, status)
    meaning = partial(failure_of_silent_end, where=home, through_ssh=False)
    return ProcessStream(source, target, process, meaning)


class _ForkedServer:
    """As much of an asyncio.subprocess.Process as the product's stream asks for."""

    def __init__(self, stderr: asyncio.StreamReader, status: asyncio.StreamReader) -> None:
        self.stderr = stderr
        self._status = status
        self._code: int | None = None

    @classmethod
    async def start(cls, messages: int, status: int) -> "_ForkedServer":
        return cls(await _reader(messages), await _reader(status))

    async def wait(self) -> int:
        if self._code is None:
            told = await self._status.read()
            self._code = int(told or b"-9")
        return self._code

    def terminate(self) -> None:
        """The nursery ends it."""

    kill = terminate


async def _reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    pipe = open(fd, "rb", buffering=0)  # noqa: SIM115 - the transport closes it
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    return reader


# --- anything else -------------------------------------------------------------------------------


def in_fork(work: Callable[[], list[str]], patience_s: float = PATIENCE_S) -> list[str]:
    """The lines that `work` returns in a fork of this process: what it opens, patches or hangs on
    stays there. A line of its own says when it failed."""
    with tempfile.TemporaryFile() as out:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _work_and_exit(work, out.fileno())
        code = wait_for(pid, patience_s)
        lines = _content(out.fileno()).decode("utf-8", "surrogateescape").splitlines()
    if code is None:
        return [*lines, f"not done within {patience_s:.0f} s"]
    return lines if code == 0 else [*lines, f"ended with {code}"]


def _work_and_exit(work: Callable[[], list[str]], out: int) -> Never:
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        try:
            lines = work()
            code = 0
        except BaseException:
            lines = ["failed: " + " / ".join(traceback.format_exc().strip().splitlines()[-6:])]
        text = "\n".join(line.replace("\n", " / ") for line in lines)
        os.write(out, text.encode("utf-8", "surrogateescape"))
    finally:
        os._exit(code)
