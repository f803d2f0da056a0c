"""What the engine needs to know from its caller: built by a surface and passed down."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Literal

from dmsync.core.values import plain_value_type

if TYPE_CHECKING:
    from dmsync.engine.hooks import HookCommands


def _log(message: str) -> None:
    import logging  # slow to import, and hardly ever needed

    logging.getLogger("dmsync.engine").info("%s", message)


Holding = Literal["wait", "try", "never"]


@plain_value_type
class DriverCommand:
    """A command of the user's own configuration that compares or merges files of one format.

    `patterns` are shell patterns of paths (`*.json`, `__default__/state/*`). Never from a remote.
    """

    name: str
    command: str
    patterns: tuple[str, ...]


@plain_value_type
class EngineSettings:
    """Choices of one invocation.

    `author` goes into commits, `actor` into the event log, `namespace` is where unqualified dot
    names live ("" is shown as nothing), `lock_wait_s` bounds how long a busy store is waited for,
    `hooks` maps a dot's written name to its commands, `say` tells the user what happened besides.
    `merge_units` are patterns of directories that are merged as one thing or not at all, besides
    those that engine/merging recognises. `signing_key` is a private key file or a public one whose
    private half an agent holds; `allowed_signers` the file of ssh-keygen(1) that says whose
    signatures count. `holding` says how the store's dots are held against gc (storage.holds) from
    when their objects are first asked for until it is closed: "wait" for it; "try", and read on
    without it; "never", for who does that himself. `sudo_user` is the number of the user who became
    root through sudo to run this: root uses his store besides its own.
    """

    author: str
    actor: str = ""
    namespace: str = ""
    lock_wait_s: float = 10.0
    hooks: Mapping[str, "HookCommands"] = field(default_factory=dict)
    say: Callable[[str], None] = _log
    diff_drivers: tuple[DriverCommand, ...] = ()
    merge_drivers: tuple[DriverCommand, ...] = ()
    merge_units: tuple[str, ...] = ()
    signing_key: str | None = None
    allowed_signers: str | None = None
    holding: Holding = "wait"
    sudo_user: int | None = None
