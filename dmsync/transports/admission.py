"""How many connections an SSH server takes before it knows who is there."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final

from dmsync.wire.limits import (
    CONNECTIONS_MAX,
    CONNECTIONS_PER_USER_MAX,
    LOGIN_TIMEOUT_S,
    SESSIONS_PER_CONNECTION_MAX,
    UNAUTHENTICATED_FREE,
    UNAUTHENTICATED_MAX,
    UNAUTHENTICATED_PER_SOURCE_MAX,
    UNAUTHENTICATED_REFUSED_PERCENT,
)

LOGIN_USUAL_S: Final = 3.0
"""Who has waited longer has stalled, or is so far away that one more try is bearable."""
KNOWN_SOURCES_MAX: Final = 1024
_IPV6_SITE_BITS = 64
"""One customer's share of the address space: its addresses count as one source."""

GiveWay = Callable[[], None]


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server; the connection limits are those of OpenSSH (MaxStartups 10:30:100).

    From `unauthenticated_free` waiting connections on, new ones are refused with a chance that
    grows from `refused_share` to certainty at `unauthenticated_max`. `per_source_max` bounds the
    waiting connections of one source (an IPv4 address, an IPv6 /64).
    """

    unauthenticated_free: int = UNAUTHENTICATED_FREE
    refused_share: float = UNAUTHENTICATED_REFUSED_PERCENT / 100
    unauthenticated_max: int = UNAUTHENTICATED_MAX
    per_source_max: int = UNAUTHENTICATED_PER_SOURCE_MAX
    connections_max: int = CONNECTIONS_MAX
    sessions_per_connection_max: int = SESSIONS_PER_CONNECTION_MAX
    login_timeout_s: float = LOGIN_TIMEOUT_S
    connections_per_user_max: int = CONNECTIONS_PER_USER_MAX
    shutdown_grace_s: float = 5.0


def _stay() -> None:
    return None


class Admission:
    """Counts the connections that wait for authentication, and all of them.

    When many wait, a new connection that chance would refuse may take the place of one that has
    waited longest, of the source that has most of them: whoever stalls is sooner or later that
    one, and whoever logs in is not. Sources from where somebody has logged in before come first.
    `give_way`, which says which connection is meant, ends it.
    """

    def __init__(
        self,
        limits: ServerLimits,
        chance: Callable[[], float] = random.random,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._chance = chance
        self._clock_s = clock_s
        self._waiting: dict[str, list[tuple[float, GiveWay]]] = {}
        """By source: since when, and how to end it; the oldest first."""
        self._waiting_count = 0
        self._known: dict[str, None] = {}
        """Sources of logins, the latest last."""
        self.connections_count = 0

    def admits(self, address: str, give_way: GiveWay = _stay) -> bool:
        """Decide about a new connection; one that is admitted is counted as waiting."""
        limits, source = self._limits, source_of(address)
        if self.connections_count >= limits.connections_max:
            return False
        if len(self._waiting.get(source, ())) >= limits.per_source_max:
            return False
        if self._chance() < self._refused_share() and not self._make_room(source):
            return False
        self._waiting.setdefault(source, []).append((self._clock_s(), give_way))
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

    def _make_room(self, source: str) -> bool:
        """End a connection for one of `source`: of a source that has more of them waiting, or one
        that has waited longer than a login takes; for a known source any of an unknown one."""
        others = [other for other in self._waiting if other not in self._known]
        if not others:
            return False
        busiest = max(others, key=lambda other: len(self._waiting[other]))
        is_greedy = len(self._waiting[busiest]) > len(self._waiting.get(source, ())) + 1
        if not is_greedy:
            busiest = min(others, key=lambda other: self._waiting[other][0][0])
        since_s, give_way = self._waiting[busiest][0]
        has_stalled = self._clock_s() - since_s >= LOGIN_USUAL_S
        if not (is_greedy or has_stalled or source in self._known):
            return False
        self._remove(busiest, 0)
        self.connections_count -= 1
        give_way()
        return True

    def _remove(self, source: str, at: int) -> None:
        self._waiting_count -= 1
        del self._waiting[source][at]
        if not self._waiting[source]:
            del self._waiting[source]

    def authenticated(self, address: str, give_way: GiveWay = _stay) -> None:
        """An admitted connection no longer waits."""
        source = source_of(address)
        self._forget(source, give_way)
        self._known.pop(source, None)
        self._known[source] = None
        if len(self._known) > KNOWN_SOURCES_MAX:
            del self._known[next(iter(self._known))]

    def _forget(self, source: str, give_way: GiveWay) -> None:
        ends = [end for _, end in self._waiting[source]]
        self._remove(source, ends.index(give_way))

    def closed(self, address: str, give_way: GiveWay = _stay, *, was_authenticated: bool) -> None:
        """An admitted connection is gone, by itself: one that gave way is not counted any more."""
        self.connections_count -= 1
        if not was_authenticated:
            self._forget(source_of(address), give_way)


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
