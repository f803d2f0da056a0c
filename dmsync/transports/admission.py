"""How many connections an SSH server takes before it knows who is there."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

_IPV6_SITE_BITS = 64
"""One customer's share of the address space: its addresses count as one source."""


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server; the connection limits are those of OpenSSH (MaxStartups 10:30:100).

    From `unauthenticated_free` waiting connections on, new ones are refused with a chance that
    grows from `refused_share` to certainty at `unauthenticated_max`. `per_source_max` bounds the
    waiting connections of one source (an IPv4 address, an IPv6 /64).
    """

    unauthenticated_free: int = 10
    refused_share: float = 0.3
    unauthenticated_max: int = 100
    per_source_max: int = 10
    connections_max: int = 1000
    sessions_per_connection_max: int = 8
    login_timeout_s: float = 30.0
    shutdown_grace_s: float = 5.0


class Admission:
    """Counts the connections that wait for authentication, and all of them."""

    def __init__(self, limits: ServerLimits, chance: Callable[[], float] = random.random) -> None:
        self._limits = limits
        self._chance = chance
        self._waiting: Counter[str] = Counter()
        self._waiting_count = 0
        self.connections_count = 0

    def admits(self, address: str) -> bool:
        """Decide about a new connection; one that is admitted is counted as waiting."""
        limits, source = self._limits, source_of(address)
        if self.connections_count >= limits.connections_max:
            return False
        if self._waiting[source] >= limits.per_source_max:
            return False
        if self._chance() < self._refused_share():
            return False
        self._waiting[source] += 1
        self._waiting_count += 1
        self.connections_count += 1
        return True

    def _refused_share(self) -> float:
        limits, waiting = self._limits, self._waiting_count
        if waiting < limits.unauthenticated_free:
            return 0.0
        if waiting >= limits.unauthenticated_max:
            return 1.0
        span = limits.unauthenticated_max - limits.unauthenticated_free
        beyond = (waiting - limits.unauthenticated_free) / span
        return limits.refused_share + (1.0 - limits.refused_share) * beyond

    def authenticated(self, address: str) -> None:
        """An admitted connection no longer waits."""
        source = source_of(address)
        self._waiting_count -= 1
        self._waiting[source] -= 1
        if not self._waiting[source]:
            del self._waiting[source]

    def closed(self, address: str, *, was_authenticated: bool) -> None:
        """An admitted connection is gone."""
        self.connections_count -= 1
        if not was_authenticated:
            self.authenticated(address)


def source_of(address: str) -> str:
    """The source that an address counts for; what is no address counts for itself."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return f"{int(parsed) >> (128 - _IPV6_SITE_BITS):x}/64"
    return str(parsed)
