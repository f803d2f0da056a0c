"""What the engine needs to know from its caller: built by a surface and passed down."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dmsync.engine.hooks import HookCommands


def _log(message: str) -> None:
    logging.getLogger("dmsync.engine").info("%s", message)


@dataclass(frozen=True)
class EngineSettings:
    """Choices of one invocation.

    `author` goes into commits, `actor` into the event log, `namespace` is where unqualified dot
    names live ("" is shown as nothing), `lock_wait_s` bounds how long a busy store is waited for,
    `hooks` maps a dot's written name to its commands, `say` tells the user what happened besides.
    """

    author: str
    actor: str = ""
    namespace: str = ""
    lock_wait_s: float = 10.0
    hooks: Mapping[str, HookCommands] = field(default_factory=dict)
    say: Callable[[str], None] = _log
