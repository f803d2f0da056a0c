"""Who may do what with which dot on a served store. Pure decisions; deny by default.

A peer has a role (what it may do at all), dot patterns (where its key may be used), and a user
name, which decides about namespaces: everybody works in the namespace of their own name and in
dots shared with them; the server's owner and keys with role admin work anywhere. A decision is
about names alone: it is the same whether or not there is a dot of that name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Final

from dmsync.engine.ports import Verb

ADMIN_USER: Final = "admin"
"""The user name that stands for the server's owner, whatever the owner's account is called."""

IsCollaborator = Callable[[str, str, str], bool]
"""(user, namespace, dot name) -> whether the dot is shared with the user."""


class Role(IntEnum):
    """What a key may do; each role includes those before it.

    READ fetches. APPEND also adds commits, fast-forwards and creates, but never rewinds, deletes
    or moves anything aside. WRITE also does that, and shares what it owns. ADMIN works in every
    namespace.
    """

    READ = 1
    APPEND = 2
    WRITE = 3
    ADMIN = 4


ROLES: Final = {"read": Role.READ, "append": Role.APPEND, "write": Role.WRITE, "admin": Role.ADMIN}
_NEEDED: Final[dict[str, Role]] = {**ROLES, "share": Role.WRITE}
_FOR_COLLABORATORS: Final = frozenset({"read", "append", "write"})
"""What a dot's owner gives away by sharing it: to share it on is not among it."""


def shared_with_nobody(user: str, namespace: str, name: str) -> bool:
    """An IsCollaborator for stores without shared dots."""
    return False


def always_valid() -> bool:
    """For peers whose access lasts as long as their session."""
    return True


@dataclass(frozen=True)
class DotPattern:
    """Shell patterns for a namespace and a dot name; neither crosses the slash between them."""

    namespace: str
    name: str

    def matches(self, namespace: str, name: str) -> bool:
        """Whether a dot is meant; case matters."""
        return fnmatchcase(namespace, self.namespace) and fnmatchcase(name, self.name)


EVERY_DOT: Final = DotPattern("*", "*")


def parse_dot_pattern(text: str, default_namespace: str) -> DotPattern:
    """Parse `name`, `namespace/name` (shell patterns), or `*` alone for every dot.

    A pattern without a namespace is for dots of `default_namespace`, as in commands.

    Raises:
        ValueError: no pattern of that form.
    """
    if text == "*":
        return EVERY_DOT
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        raise ValueError(f"no dot pattern: {text!r}")
    if not all(character.isalnum() or character in "_-*?[]!/" for character in text):
        raise ValueError(f"no dot pattern: {text!r}")
    return DotPattern(namespace if slash else _literally(default_namespace), name)


def _literally(text: str) -> str:
    """A user name may hold no pattern characters, but nothing here relies on it."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


@dataclass(frozen=True)
class Access:
    """What one authenticated peer may do (engine.ports.Access).

    `patterns` None: the key names no dots, so only namespaces decide. Patterns narrow everything
    the key may do, and let it read, but not change, what they name in other namespaces.
    `is_owner`: the user owns the store. `fingerprint` of the key, `login` and `address` say who is
    there: for the log, and for a client that wants to know whom the server takes it for. `only`:
    the dots that this session was opened for, within what the key may do. `is_valid` tells, cheaply
    and in any thread, whether what let the peer in still does.
    """

    user: str
    role: Role
    patterns: tuple[DotPattern, ...] | None = None
    is_owner: bool = False
    is_collaborator: IsCollaborator = shared_with_nobody
    fingerprint: str = ""
    login: str = ""
    address: str = ""
    only: DotPattern | None = None
    is_valid: Callable[[], bool] = always_valid

    @property
    def actor(self) -> str:
        """Who the log says did it: the user and, where one is known, the key."""
        return f"{self.user} {self.fingerprint}" if self.fingerprint else self.user

    @property
    def default_namespace(self) -> str:
        """Where dots without a namespace are: "" (shown as nothing) for the owner's."""
        return "" if self._is_everywhere_at_home else self.user

    @property
    def _is_everywhere_at_home(self) -> bool:
        return self.is_owner or self.role is Role.ADMIN

    def may(self, namespace: str, name: str, verb: Verb) -> bool:
        """May the peer do `verb` with the dot namespace/name (whether or not it exists)?"""
        needed = _NEEDED.get(verb)
        if needed is None or self.role < needed or not self.is_valid():
            return False
        is_named = self.patterns is None or any(
            pattern.matches(namespace, name) for pattern in self.patterns
        )
        if not is_named or (self.only is not None and not self.only.matches(namespace, name)):
            return False
        if self._is_everywhere_at_home or namespace == self.user:
            return True
        if needed is Role.READ and self.patterns is not None:
            return True
        return verb in _FOR_COLLABORATORS and self.is_collaborator(self.user, namespace, name)


def full_access(user: str) -> Access:
    """For peers that could open the store's files themselves: stdio, local."""
    return Access(user=user, role=Role.ADMIN, is_owner=True)


def access_for(
    user: str,
    role: Role,
    dots: Sequence[str] | None,
    *,
    owner: str,
    is_collaborator: IsCollaborator = shared_with_nobody,
) -> Access:
    """The access of an authenticated user of a store that belongs to `owner`.

    `dots`: pattern texts from the user's key, None when it has none.

    Raises:
        ValueError: a pattern that cannot be read (callers must deny).
    """
    is_owner = user in (owner, ADMIN_USER)
    at_home = Access(user, role, None, is_owner, is_collaborator)
    if dots is None:
        return at_home
    patterns = tuple(parse_dot_pattern(text, at_home.default_namespace) for text in dots)
    return Access(user, role, patterns, is_owner, is_collaborator)
