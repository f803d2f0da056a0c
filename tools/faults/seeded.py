"""The product with one fault put in: a suite that does not catch these would show nothing.

    python -m tools.faults.seeded NAME [ARGUMENT...]     `dm ARGUMENT...` with the fault NAME

The product knows nothing of this: `apply(name)` patches it in the running process, before `main`,
and whatever is forked from there on has the fault too. A row calls it in the process that is to be
the victim (a hook of `forked.start_dm`, a server started by hand, a simulation's own process), and
never where it verifies. `FAULTS[name].caught_by` names the rows that have to find losses with it
("controls": a check of its own there); `python -m tools.faults controls` runs them.
"""

import atexit
import errno
import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Fault:
    """`patch` changes the running process for good. `caught_by`: rows of the catalogue."""

    name: str
    what: str
    caught_by: tuple[str, ...]
    patch: Callable[[], None]


def apply(name: str) -> None:
    """Put the fault into this process. Raises KeyError for a name that is none."""
    FAULTS[name].patch()


# --- durability ----------------------------------------------------------------------------------


def _replace_fsync(replacement: Callable[[Callable[[int], None], int], None]) -> None:
    """`os.fsync` and `os.fdatasync` by `replacement(the real one, descriptor)`."""
    module: Any = os
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        setattr(module, name, lambda fd, real=real: replacement(real, _number(fd)))


def _number(fd: Any) -> int:
    return fd if isinstance(fd, int) else int(fd.fileno())


def _is_directory(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def _no_directory_fsync() -> None:
    _replace_fsync(lambda real, fd: None if _is_directory(fd) else real(fd))


def _no_file_fsync() -> None:
    from dmsync.engine import safe_files
    from dmsync.engine.restoring import writeback

    _replace_fsync(lambda real, fd: real(fd) if _is_directory(fd) else None)
    for module in (safe_files, writeback):
        if hasattr(module, "sync_filesystem"):
            setattr(module, "sync_filesystem", lambda fd: None)  # noqa: B010


def _acknowledge_early() -> None:
    """The log's fsync comes when everything has been said."""
    waiting: list[int] = []

    def sync(real: Callable[[int], None], fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".log"):
            waiting.append(os.dup(fd))
        else:
            real(fd)

    real_fsync = os.fsync
    _replace_fsync(sync)

    def late() -> None:
        for fd in waiting:
            try:
                real_fsync(fd)
            except OSError:
                pass  # part of the fault: it has been said already

    atexit.register(late)


def _retry_fsync() -> None:
    def sync(real: Callable[[int], None], fd: int) -> None:
        try:
            real(fd)
        except OSError:
            real(fd)

    _replace_fsync(sync)


def _delete_first() -> None:
    """Packs that are joined go before the joined one is there."""
    from dmsync.storage import pack_consolidation
    from dmsync.storage.packs import PackBuilder

    builder: Any = PackBuilder
    consolidation: Any = pack_consolidation
    real_finish, real_read = builder.finish, consolidation._read_whole
    read: list[str] = []

    def read_whole(path: str, name: str) -> Any:
        read.append(path)
        return real_read(path, name)

    def finish(self: Any) -> Any:
        while read:
            os.unlink(read.pop())
        return real_finish(self)

    consolidation._read_whole, builder.finish = read_whole, finish


def _ignore_short_write() -> None:
    module: Any = os
    real_write, real_pwrite = os.write, os.pwrite

    def write(fd: int, data: Any) -> int:
        real_write(fd, data)
        return len(data)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        real_pwrite(fd, data, offset)
        return len(data)

    module.write, module.pwrite = write, pwrite


def _swallow_eio() -> None:
    module: Any = os

    def quiet(real: Callable[..., Any], *given: Any) -> Any:
        try:
            return real(*given)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            return len(given[1]) if len(given) > 1 else None

    for name in ("write", "pwrite", "fsync", "fdatasync"):
        setattr(module, name, lambda *given, real=getattr(os, name): quiet(real, *given))


# --- concurrency ---------------------------------------------------------------------------------


def _no_compare_and_swap() -> None:
    """A ref is set, whatever it was."""
    from dmsync.engine import sync_refs, sync_server
    from dmsync.wire.messages import RefStatus

    refs: Any = sync_refs
    server: Any = sync_server
    real = refs._judge

    def judge(*given: Any) -> Any:
        status, error = real(*given)
        return (RefStatus.FORCED, None) if error is not None else (status, None)

    refs._judge = judge
    server.early_divergence = lambda *given: None


STALE_S: Final = 0.02


def _stale_locks() -> None:
    """A lock that was taken a while ago, by the clock, is taken for forgotten."""
    import time

    from dmsync.storage import locks

    module: Any = locks
    real = module._try_lock

    def try_lock(file: int, *, shared: bool) -> bool:
        return real(file, shared=shared) or time.time() - os.fstat(file).st_mtime > STALE_S

    module._try_lock = try_lock


# --- what others say and do ----------------------------------------------------------------------


def _look_then_open() -> None:
    """lstat, then open: what was no link when it was looked at may be one when it is opened."""
    module: Any = os
    real = os.open

    def careless(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_NOFOLLOW and not flags & (os.O_CREAT | getattr(os, "O_PATH", 0)):
            if stat.S_ISLNK(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            flags &= ~os.O_NOFOLLOW
        return real(path, flags, mode, dir_fd=dir_fd)

    module.open = careless


def _trust_the_wire() -> None:
    """What a peer says it has sent is taken to be there: no proof of closure."""
    from dmsync.engine import sync_pull, sync_server

    for module in (sync_pull, sync_server):
        setattr(module, "prove_closure", _believe)  # noqa: B010


def _believe(incoming: Any, here: Any, tips: Any) -> Any:
    from dmsync.engine import sync_incoming

    module: Any = sync_incoming
    new = yield from module._new_commits(incoming.quarantine, here.graph.has, tips)
    return module.Arrivals(tuple(new), tuple(new))


def _unlimited_zstd() -> None:
    """A frame may decode to as much as it likes."""
    import zstandard

    from dmsync.core import delta

    module: Any = delta

    def decompress(frame: bytes, raw_bytes: int, prefix: Any = None) -> bytes:
        kind = zstandard.DICT_TYPE_RAWCONTENT
        has_prefix = prefix is not None and len(prefix) >= delta.PREFIX_BYTES_MIN
        known = zstandard.ZstdCompressionDict(bytes(prefix), dict_type=kind) if has_prefix else None
        return zstandard.ZstdDecompressor(dict_data=known).decompress(frame)

    module.decompress = decompress
    for name, loaded in list(sys.modules.items()):
        if name.startswith("dmsync.") and hasattr(loaded, "decompress"):
            setattr(loaded, "decompress", decompress)  # noqa: B010


FAULTS: Final[dict[str, Fault]] = {
    fault.name: fault
    for fault in (
        Fault(
            "no-directory-fsync",
            "names are not made durable",
            ("kills", "power-cuts", "block-states"),
            _no_directory_fsync,
        ),
        Fault(
            "no-file-fsync",
            "bytes are not made durable",
            ("kills", "power-cuts", "block-states"),
            _no_file_fsync,
        ),
        Fault(
            "acknowledge-early",
            "done is said before the log's fsync",
            ("kills", "errors", "power-cuts"),
            _acknowledge_early,
        ),
        Fault("retry-fsync", "an fsync that failed is tried again", ("errors",), _retry_fsync),
        Fault(
            "delete-first", "old packs go before the new one is there", ("kills",), _delete_first
        ),
        Fault("look-then-open", "paths are checked, then opened", ("races",), _look_then_open),
        Fault("no-compare-and-swap", "refs are set unseen", ("load-kills",), _no_compare_and_swap),
        Fault("trust-the-wire", "closure is not proven", ("controls",), _trust_the_wire),
        Fault("unlimited-zstd", "no limit on what is unpacked", ("controls",), _unlimited_zstd),
        Fault("stale-locks", "locks go stale by the clock", ("load-kills",), _stale_locks),
        Fault(
            "ignore-short-write",
            "what was written is not counted",
            ("errors",),
            _ignore_short_write,
        ),
        Fault("swallow-eio", "EIO is taken for success", ("errors",), _swallow_eio),
    )
}


def main(arguments: Sequence[str]) -> int:
    name, *rest = arguments
    sys.argv = ["dm", *rest]
    apply(name)
    from dmsync.surfaces.cli.entry import main as dm

    return dm()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
