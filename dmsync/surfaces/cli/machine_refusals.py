"""Failures that nobody wrote a case for and that are the machine's all the same.

Almost any line may need memory, a thread or a descriptor. What has a meaning for the work under
way is translated where it happens (storage.durable); the rest ends here, and is no bug of dm.
"""

import errno
from typing import Final

from dmsync.errors import DmError, Exhausted, StorageFailed, StorageFull

_HINT: Final = "try again when the machine has more to give"
_TOO_LITTLE: Final = {
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "not enough memory",
    errno.EAGAIN: "too many processes or threads (ulimit -u)",
}
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED: Final = frozenset(
    {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV, errno.ESTALE}
)
_SQLITE_REFUSED: Final = {
    7: errno.ENOMEM,  # NOMEM
    8: errno.EROFS,  # READONLY
    10: errno.EIO,  # IOERR
    13: errno.ENOSPC,  # FULL
}
_SQLITE_CANNOT_OPEN: Final = 14
_ZSTD_NO_MEMORY: Final = "Allocation error : not enough memory"
_CHAIN_LENGTH_MAX: Final = 32


def machine_refusal(failure: BaseException) -> DmError | None:
    """What the machine refused, or None when the failure is a bug. What was raised while another
    failure was handled is looked through: the first cause that says something counts."""
    link: BaseException | None = failure
    for _ in range(_CHAIN_LENGTH_MAX):
        if link is None:
            return None
        if (refusal := _refusal(link)) is not None:
            return refusal
        link = link.__cause__ or link.__context__
    return None


def _refusal(failure: BaseException) -> DmError | None:
    if isinstance(failure, MemoryError) or _ZSTD_NO_MEMORY in str(failure):
        return _exhausted(errno.ENOMEM)
    if isinstance(failure, RuntimeError) and "can't start new thread" in str(failure):
        return _exhausted(errno.EAGAIN)
    if isinstance(failure, OSError):
        return _refusal_of_system(failure.errno or 0, failure)
    sqlite_code = getattr(failure, "sqlite_errorcode", None)
    if not isinstance(sqlite_code, int):
        return None
    if sqlite_code & 0xFF == _SQLITE_CANNOT_OPEN:
        return StorageFailed(f"a database of the store cannot be opened: {failure}", hint=_HINT)
    return _refusal_of_system(_SQLITE_REFUSED.get(sqlite_code & 0xFF, 0), failure)


def _refusal_of_system(number: int, failure: BaseException) -> DmError | None:
    if number in _TOO_LITTLE:
        return _exhausted(number)
    if number in _FULL:
        return StorageFull(str(failure), errno=number)
    if number in _REFUSED:
        return StorageFailed(str(failure), errno=number)
    return None


def _exhausted(number: int) -> Exhausted:
    return Exhausted(_TOO_LITTLE[number], hint=_HINT, errno=number)
