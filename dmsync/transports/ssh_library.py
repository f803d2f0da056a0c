"""asyncssh as dmsync uses it: imported without side effects, not too old, one set of options.

Import this module only where a connection is about to be made: it takes a tenth of a second.
"""

import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from dmsync.errors import ConfigError
from dmsync.wire.limits import KEEPALIVE_INTERVAL_S, KEEPALIVES_MAX

__all__ = ["KEEPALIVE_COUNT_MAX", "KEEPALIVE_INTERVAL_S", "TRANSPORT_OPTIONS", "asyncssh"]


def _no_library(name: str) -> str | None:
    return None


@contextmanager
def _without_library_search() -> Iterator[None]:
    """asyncssh looks for optional C libraries at import, for which ctypes runs ldconfig and gcc."""
    find_library = ctypes.util.find_library
    ctypes.util.find_library = _no_library
    try:
        yield
    finally:
        ctypes.util.find_library = find_library


with _without_library_search():
    import asyncssh
    from asyncssh.kex import get_default_kex_algs

OLDEST_VERSION: Final = (2, 24, 1)
"""Before it an unauthenticated peer could make the server hold whatever it sent."""


def _check_version(version: str) -> None:
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_VERSION:
        oldest = ".".join(str(number) for number in OLDEST_VERSION)
        raise ConfigError(f"asyncssh {version} is too old: dmsync needs {oldest}")


_check_version(asyncssh.__version__)


def _refuse_environment(channel: object, packet: object) -> bool:
    """Nothing here reads what a client would have in the environment, of whatever size."""
    return False


assert hasattr(asyncssh.SSHServerChannel, "_process_env_request"), "environments are kept again"
setattr(asyncssh.SSHServerChannel, "_process_env_request", _refuse_environment)  # noqa: B010

KEEPALIVE_COUNT_MAX: Final = KEEPALIVES_MAX - 1
"""asyncssh gives a silent peer up one interval after so many: 60 s."""
_REKEY_BYTES: Final = 4 << 30
"""AES-GCM with SSH's invocation counter stands far more; each new key costs round trips."""

_KEY_EXCHANGES: Final = [
    name.decode()
    for name in get_default_kex_algs()
    if not name.startswith(b"gss-") and not name.endswith(b"-sha1")
]

TRANSPORT_OPTIONS: Final[dict[str, Any]] = {
    "config": None,  # `UserKnownHostsFile none` in a user's file would switch host checking off
    "kex_algs": _KEY_EXCHANGES,
    "encryption_algs": [
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "chacha20-poly1305@openssh.com",
    ],
    "compression_algs": ["none"],  # inflation is not bounded; our frames are compressed
    "encoding": None,
    "window": 32 << 20,
    "max_pktsize": 128 << 10,
    "rekey_bytes": _REKEY_BYTES,
    "keepalive_interval": KEEPALIVE_INTERVAL_S,
    "keepalive_count_max": KEEPALIVE_COUNT_MAX,
    "agent_forwarding": False,
    "x11_forwarding": False,
}
"""What both ends set: each end sets the limits of what it receives."""
