"""Who may do what with which dot: the table, written down apart from the code that decides.

Each cell of users x dots x verbs has one expected answer. Levels say how far a user gets with a
dot; a verb needs a level. What is below `read` must look like a dot that is not there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final


class Level(IntEnum):
    """How far somebody gets with a dot."""

    NO_LOGIN = 0
    NOTHING = 1
    READ = 2
    APPEND = 3
    WRITE = 4
    OWN = 5
    """WRITE, and share it."""


class Answer(StrEnum):
    """What the client is told."""

    DONE = "done"
    DENIED = "denied"
    HIDDEN = "no-dot"
    CLASH = "dot-id-clash"
    """The id is in use, under a name that need not be told."""
    NO_LOGIN = "no-login"
    NO_SUCH_REQUEST = "not served"
    """The server knows no such thing, whoever asks."""


OWNER: Final = "@owner"
"""Stands for the account that owns the store: its name is not known here."""


@dataclass(frozen=True)
class User:
    """One way to come: the name logged in with, and the options of the key's line (None: none)."""

    name: str
    login: str
    options: str | None = ""
    levels: tuple[Level, ...] = ()
    """For each of DOTS."""
    may_create: bool = False
    """Dots in alice's namespace."""
    is_at_home: bool = False
    """In the namespace of their own name they may create: without a namespace, names are there."""


class Dot(StrEnum):
    """The dots of the scene, by name. GONE was deleted, ABSENT never was."""

    OWN = "alice/own"
    SHARED = "alice/shared"
    PATTERN = "alice/pat-1"
    FOREIGN = "bob/his"
    TOP = "top"
    GONE = "alice/gone"
    ABSENT = "alice/none"


LIVE: Final = (Dot.OWN, Dot.SHARED, Dot.PATTERN, Dot.FOREIGN, Dot.TOP)
_O, _W, _A, _R, _N, _X = (
    Level.OWN,
    Level.WRITE,
    Level.APPEND,
    Level.READ,
    Level.NOTHING,
    Level.NO_LOGIN,
)
USERS: Final = (
    # levels of:                                   own shared pat-1 his top
    User("owner", OWNER, "", (_O, _O, _O, _O, _O), may_create=True),
    User("owner by alias", "admin", "", (_O, _O, _O, _O, _O), may_create=True),
    User("admin key", "ops", 'dm-user="ops",dm-role="admin"', (_O,) * 5, may_create=True),
    User("namespace user", "alice", 'dm-user="alice"', (_O, _O, _O, _N, _N), True, True),
    User("collaborator", "bob", 'dm-user="bob"', (_N, _W, _N, _O, _N), is_at_home=True),
    User("stranger", "carol", 'dm-user="carol"', (_N,) * 5, is_at_home=True),
    User("read key", "alice", 'dm-user="alice",dm-role="read"', (_R, _R, _R, _N, _N)),
    User(
        "append key",
        "alice",
        'dm-user="alice",dm-role="append"',
        (_A, _A, _A, _N, _N),
        may_create=True,
        is_at_home=True,
    ),
    User(
        "write key",
        "alice",
        'dm-user="alice",dm-role="write"',
        (_O, _O, _O, _N, _N),
        may_create=True,
        is_at_home=True,
    ),
    User("read collaborator", "bob", 'dm-user="bob",dm-role="read"', (_N, _R, _N, _R, _N)),
    User(
        "append collaborator",
        "bob",
        'dm-user="bob",dm-role="append"',
        (_N, _A, _N, _A, _N),
        is_at_home=True,
    ),
    User("own patterns", "alice", 'dm-user="alice",dm-dots="shared"', (_N, _O, _N, _N, _N)),
    User(
        "foreign patterns",
        "dave",
        'dm-user="dave",dm-dots="alice/pat-*"',
        (_N, _N, _R, _N, _N),
    ),
    User(
        "admin with patterns",
        "eve",
        'dm-user="eve",dm-role="admin",dm-dots="alice/shared"',
        (_N, _O, _N, _N, _N),
    ),
    User("denied line", "alice", 'dm-user="alice",no-such-option', (_X,) * 5),
    User("unreadable role", "alice", 'dm-user="alice",dm-role="god"', (_X,) * 5),
    User("elsewhere", "alice", 'dm-user="alice",from="192.0.2.0/24"', (_X,) * 5),
    User("unknown key", "alice", None, (_X,) * 5),
    User("wrong user for the key", "alice", 'dm-user="bob"', (_X,) * 5),
    User("no namespace", "../root", "", (_X,) * 5),
)

VERBS: Final[dict[str, Level]] = {
    "list": Level.READ,
    "refs": Level.READ,
    "known": Level.READ,
    "fetch": Level.READ,
    "clone": Level.READ,
    "push": Level.APPEND,
    "create-branch": Level.APPEND,
    "create-tag": Level.APPEND,
    "force": Level.WRITE,
    "move-tag": Level.WRITE,
    "stash": Level.WRITE,
    "share-list": Level.OWN,
    "share-add": Level.OWN,
    "share-remove": Level.OWN,
}
"""What the wire can ask for of a dot that is there."""
CREATES: Final = ("create-dot", "revive-dot")
"""Of a dot that is not there: under a new id, under that of a deleted one."""
NOWHERE: Final = (
    "delete-branch",
    "delete-tag",
    "delete-dot",
    "rename-branch",
    "gc",
    "shell",
    "sftp",
)
"""What no key may ask of a server: there is no message and no command for it."""


@dataclass(frozen=True)
class Cell:
    """One question and its answer."""

    user: User
    dot: Dot
    verb: str
    answer: Answer

    def __str__(self) -> str:
        return f"{self.user.name} / {self.dot.value} / {self.verb}"


def cells() -> Iterator[Cell]:
    """Every cell, a user's together."""
    for user in USERS:
        for dot in Dot:
            for verb in (*VERBS, *CREATES, *NOWHERE):
                yield Cell(user, dot, verb, _answer(user, dot, verb))


def _answer(user: User, dot: Dot, verb: str) -> Answer:
    if user.levels[0] is Level.NO_LOGIN:
        return Answer.NO_LOGIN
    if verb in NOWHERE:
        return Answer.NO_SUCH_REQUEST
    level = user.levels[LIVE.index(dot)] if dot in LIVE else Level.NOTHING
    if verb in CREATES:
        return _answer_to_creation(user, dot, verb, level)
    if level < Level.READ:
        return Answer.HIDDEN
    return Answer.DONE if level >= VERBS[verb] else Answer.DENIED


def _answer_to_creation(user: User, dot: Dot, verb: str, level: Level) -> Answer:
    """Where a dot is, its name cannot be taken; whoever may not see it is denied as ever."""
    if dot is Dot.TOP and user.is_at_home:  # a name of their own, and perhaps somebody's id
        return Answer.CLASH if verb == "revive-dot" else Answer.DONE
    if dot in LIVE:
        return Answer.DENIED if level < Level.APPEND else Answer.DONE
    return Answer.DONE if user.may_create else Answer.DENIED
