"""One try: a scene's command with a supervisor at its system calls, then the scene's verdict.

The command runs in a fork (tools/faults/forked.py) or as the real `python -m dmsync`. It keeps the
threads and worker processes it has; the trees of scenes are too small for it to want a second
worker, so that one try has nearly the same calls in the same order as the next.
"""

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Final

from tools.faults import forked, seeded
from tools.faults.scenes import Scene
from tools.faults.system_calls import LOOKING, MUTATING, Call, Listener, be_supervised

PATIENCE_S: Final = 25.0
"""A command that has not ended by then hangs."""

Judge = Callable[["Supervision", Call], None]
"""Answers one call, by methods of the supervision."""


@dataclass
class Outcome:
    """How a command ended, and how many calls it made of the set."""

    code: int | None
    stdout: bytes
    stderr: bytes
    calls: int
    was_hit: bool
    notes: list[str] = field(default_factory=list)

    @property
    def ran(self) -> forked.Ran:
        return forked.Ran(self.code, self.stdout, self.stderr)


class Supervision:
    """Answers the calls of a victim until nothing of it is left. `calls` counts them from 0."""

    def __init__(self, judge: Judge, sender: socket.socket) -> None:
        self._judge = judge
        self._sender = sender
        self._listeners: dict[int, Listener] = {}
        self._current: Listener | None = None
        self._groups: set[int] = set()
        self.calls = 0
        self.was_hit = False
        self.notes: list[str] = []

    # --- answers ---------------------------------------------------------------------------------

    def let_through(self, call: Call) -> None:
        self._now.let_through(call)

    def fail(self, call: Call, number: int) -> None:
        self.was_hit = True
        self._now.fail(call, number)

    def cut_short(self, call: Call) -> bool:
        done = self._now.cut_short(call)
        self.was_hit = self.was_hit or done
        return done

    def kill(self, call: Call) -> None:
        """SIGKILL for the victim's whole group, before the call is made."""
        self.was_hit = True
        try:
            os.killpg(os.getpgid(call.process()), signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            pass  # it is dying already

    @property
    def _now(self) -> Listener:
        assert self._current is not None
        return self._current

    # --- the loop --------------------------------------------------------------------------------

    def run(self, pidfd: int, patience_s: float = PATIENCE_S) -> bool:
        """Until the process of `pidfd` has ended and no victim is left; False when that takes too
        long."""
        poll = select.poll()
        for descriptor in (pidfd, self._sender.fileno()):
            poll.register(descriptor, select.POLLIN)
        end = time.monotonic() + patience_s
        has_ended = False
        try:
            while not has_ended or self._listeners:
                ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
                if not ready and time.monotonic() >= end:
                    for group in self._groups:
                        forked.kill_group(group)
                    return False
                for descriptor, what in ready:
                    if descriptor == pidfd:
                        has_ended = True
                        poll.unregister(pidfd)
                    elif descriptor == self._sender.fileno():
                        self._take_listener(poll)
                    elif what & select.POLLIN:
                        self._answer(self._listeners[descriptor])
                    else:
                        poll.unregister(descriptor)
                        os.close(self._listeners.pop(descriptor).descriptor)
            return True
        finally:
            for listener in self._listeners.values():
                os.close(listener.descriptor)

    def _take_listener(self, poll: select.poll) -> None:
        _, descriptors, _, _ = socket.recv_fds(self._sender, 1, 1)
        if not descriptors:
            poll.unregister(self._sender)
            return
        for descriptor in descriptors:
            self._listeners[descriptor] = Listener(descriptor)
            poll.register(descriptor, select.POLLIN)

    def _answer(self, listener: Listener) -> None:
        call = listener.next_call()
        if call is None:
            return
        self._current = listener
        try:
            if not listener.has_spoken:
                listener.has_spoken = True
                self._groups.add(os.getpgid(call.process()))
            self._judge(self, call)
        except (FileNotFoundError, ProcessLookupError):
            pass  # killed by somebody else while it waited
        self.calls += 1


def let_all_through(supervision: Supervision, call: Call) -> None:
    supervision.let_through(call)


@dataclass(frozen=True)
class Victim:
    """What is done to whom. `looks`: calls that only read are of the set too. `fault`: one seeded
    in the victim (tools/faults/seeded.py). `is_real`: not a fork but a fresh interpreter."""

    scene: Scene
    judge: Judge = let_all_through
    looks: bool = False
    fault: str = ""
    is_real: bool = False

    def run(self, directory: str) -> Outcome:
        """Run the scene's command in `directory`, which is settled."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        supervision = Supervision(self.judge, ours)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self._run(directory, supervision, theirs, (out, err))
            ours.close()
            told = [
                os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in (out, err)
            ]
        return Outcome(
            code, told[0], told[1], supervision.calls, supervision.was_hit, supervision.notes
        )

    def _run(
        self,
        directory: str,
        supervision: Supervision,
        theirs: socket.socket,
        outputs: tuple[IO[bytes], IO[bytes]],
    ) -> int | None:
        environment = self.scene.environment(directory)
        is_server = self.scene.victim == "far"
        hook = partial(self._begin, theirs)
        if self.is_real and not is_server:
            return self._run_really(environment, supervision, theirs, outputs)
        nursery = forked.Nursery(environment, hook if is_server else None)
        with nursery:
            pid = forked.start_dm(
                self.scene.arguments(),
                environment,
                (outputs[0].fileno(), outputs[1].fileno()),
                nursery=nursery,
                hook=None if is_server else hook,
            )
            theirs.close()
            return self._supervised(pid, supervision)

    def _begin(self, supervisor: socket.socket) -> None:
        """In the victim, before it does anything."""
        os.setpgid(0, 0)
        if self.fault:
            seeded.apply(self.fault)
        names = MUTATING | LOOKING if self.looks else MUTATING
        be_supervised(supervisor, names, all_opens=self.looks)
        supervisor.close()

    def _run_really(
        self,
        environment: dict[str, str],
        supervision: Supervision,
        theirs: socket.socket,
        outputs: tuple[IO[bytes], IO[bytes]],
    ) -> int | None:
        names = MUTATING | LOOKING if self.looks else MUTATING
        process = subprocess.Popen(
            [*_program(self.fault), *self.scene.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=outputs[0],
            stderr=outputs[1],
            env=environment,
            start_new_session=True,
            # Forked with one thread: nothing is held that the child would wait for.
            preexec_fn=partial(be_supervised, theirs, names, all_opens=self.looks),
        )
        theirs.close()
        code = self._supervised(process.pid, supervision)
        process.returncode = code  # it has been waited for
        return code

    def _supervised(self, pid: int, supervision: Supervision) -> int | None:
        pidfd = os.pidfd_open(pid)
        try:
            in_time = supervision.run(pidfd)
        finally:
            os.close(pidfd)
        if not in_time:
            forked.kill_group(pid)
        code = forked.wait_for(pid, PATIENCE_S)
        return code if in_time else None


def _program(fault: str) -> Sequence[str]:
    if not fault:
        return forked.REAL_DM
    return (*forked.REAL_DM[:2], "-m", "tools.faults.seeded", fault)
