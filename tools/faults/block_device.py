"""A disk that remembers: a loop device on a file that this module serves through /dev/fuse.

Every write is kept with its place, every flush as a mark, and lines that others send on a socket
(acknowledgements) as marks between them. A server in a process of its own speaks the FUSE protocol
(linux/fuse.h, 7.31) for a mount whose root is that one file.
"""

import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tools.faults.apart import die_with_parent, mount, unmount

_READ_BYTES: Final = 1 << 20
_WRITE_BYTES_MAX: Final = 256 * 1024
_PAGES_MAX: Final = 64
_IN_HEADER: Final = "=IIQQIIIHH"
_OUT_HEADER: Final = "=IiQ"
_IN_BYTES: Final = struct.calcsize(_IN_HEADER)
_ATTRIBUTES: Final = "=QIIQQQQQQIIIIIIIIII"
_ATTRIBUTES_VALID_S: Final = 3600
_ROOT_ID: Final = 1
_MAX_PAGES_FLAG: Final = 1 << 22
_BIG_WRITES_FLAG: Final = 1 << 5
_DIRECT_IO: Final = 1
_ENOSYS: Final = 38
_RECORD: Final = "=BQI"
_RECORD_BYTES: Final = struct.calcsize(_RECORD)


class Call(IntEnum):
    """Requests of the kernel."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


class Happened(IntEnum):
    """Kinds of records."""

    WRITE = 1
    FLUSH = 2
    SAID = 3


@dataclass(frozen=True)
class Record:
    """One thing that happened. `data`: bytes written at `offset`, or a line that was said."""

    kind: Happened
    offset: int = 0
    data: bytes = b""


class RecordedDisk:
    """`path` is a file that can be put under a loop device; `say` is where lines are sent to.

    What is on it is in the file `backing`, which must be there. Context manager: at its end, with
    nothing mounted any more, `records` returns all that happened.
    """

    def __init__(self, backing: str, path: str) -> None:
        self._backing = backing
        self.path = path
        self._log = f"{path}.log"
        self.say, self._heard = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pid = 0

    def __enter__(self) -> "RecordedDisk":
        with open(self.path, "wb"):
            pass
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={fuse},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
        mount("recorded", self.path, "fuse", 0, options)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                die_with_parent()
                self.say.close()
                _Server(fuse, self._backing, self._heard, self._log).run()
            finally:
                os._exit(0)
        os.close(fuse)
        self._heard.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.say.close()
        unmount(self.path, lazily=True)
        os.waitpid(self._pid, 0)

    def records(self) -> list[Record]:
        """What happened, in order."""
        with open(self._log, "rb") as file:
            log = file.read()
        return list(_records(log))


def _records(log: bytes) -> Iterator[Record]:
    place, unfinished = 0, b""
    while place < len(log):
        kind, offset, length = struct.unpack_from(_RECORD, log, place)
        place += _RECORD_BYTES
        data = log[place : place + length]
        place += length
        if kind != Happened.SAID:
            yield Record(Happened(kind), offset, data)
            continue
        *lines, unfinished = (unfinished + data).split(b"\n")
        yield from (Record(Happened.SAID, 0, line) for line in lines)


class _Server:
    """Answers one request after the other, so that their order is what the log says."""

    def __init__(self, fuse: int, backing: str, heard: socket.socket, log: str) -> None:
        self._fuse = fuse
        self._file = os.open(backing, os.O_RDWR)
        self._size = os.fstat(self._file).st_size
        self._heard = heard
        self._log = open(log, "wb")  # noqa: SIM115 - for as long as the process runs
        self._calls: dict[int, Callable[[memoryview], bytes]] = {
            Call.INIT: self._init,
            Call.GETATTR: self._attributes,
            Call.SETATTR: self._attributes,
            Call.OPEN: lambda _: struct.pack("=QII", 0, _DIRECT_IO, 0),
            Call.READ: self._read,
            Call.WRITE: self._write,
            Call.FSYNC: self._flush,
            Call.FLUSH: lambda _: b"",
            Call.RELEASE: lambda _: b"",
        }

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._heard, select.POLLIN)
        poll.register(self._fuse, select.POLLIN)
        buffer = bytearray(_READ_BYTES + _WRITE_BYTES_MAX)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._heard.fileno() in ready:
                # Before the request: what came of saying it cannot come before it.
                said = self._heard.recv(_READ_BYTES)
                if said:
                    self._note(Happened.SAID, 0, said)
                else:
                    poll.unregister(self._heard)
            elif self._fuse in ready:
                try:
                    length = os.readv(self._fuse, [buffer])
                except OSError:  # it was unmounted
                    break
                if not self._answer(memoryview(buffer)[:length]):
                    break
        self._log.close()

    def _note(self, kind: Happened, offset: int, data: bytes | memoryview) -> None:
        self._log.write(struct.pack(_RECORD, kind, offset, len(data)))
        self._log.write(data)

    def _answer(self, request: memoryview) -> bool:
        """False: it was the last one."""
        call: int
        _, call, unique, *_ = struct.unpack_from(_IN_HEADER, request)
        if call in (Call.FORGET, Call.BATCH_FORGET, Call.INTERRUPT):
            return True
        work = self._calls.get(call)
        body = work(request[_IN_BYTES:]) if work is not None else b""
        error = 0 if work is not None or call == Call.DESTROY else -_ENOSYS
        header = struct.pack(_OUT_HEADER, 16 + len(body), error, unique)
        os.writev(self._fuse, [header, body])
        return call != Call.DESTROY

    def _init(self, body: memoryview) -> bytes:
        _, _, readahead, _ = struct.unpack_from("=IIII", body)
        flags = _MAX_PAGES_FLAG | _BIG_WRITES_FLAG
        answer = struct.pack(
            "=IIIIHHIIHH",
            7,
            31,
            readahead,
            flags,
            16,
            12,
            _WRITE_BYTES_MAX,
            1,
            _PAGES_MAX,
            0,
        )
        return answer.ljust(64, b"\0")

    def _attributes(self, _: memoryview) -> bytes:
        mode = stat.S_IFREG | 0o600
        times = (0, 0, 0)
        return struct.pack(
            _ATTRIBUTES,
            _ATTRIBUTES_VALID_S,
            0,
            0,
            _ROOT_ID,
            self._size,
            self._size // 512,
            *times,
            *times,
            mode,
            1,
            0,
            0,
            0,
            4096,
            0,
        )

    def _read(self, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        return os.pread(self._file, size, offset)

    def _write(self, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        data = body[40 : 40 + size]
        os.pwrite(self._file, data, offset)
        self._note(Happened.WRITE, offset, data)
        return struct.pack("=II", size, 0)

    def _flush(self, _: memoryview) -> bytes:
        self._note(Happened.FLUSH, 0, b"")
        return b""
