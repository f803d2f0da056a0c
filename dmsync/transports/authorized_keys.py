"""Who may log in to our SSH server: an authorized_keys file with dm-role, dm-dots and dm-user.

Fails closed: a line with an option that is not known or cannot be read denies its key, even when
another line lets the same key in.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from dmsync.engine.access import ROLES, Role, parse_dot_pattern
from dmsync.errors import StorageFailed
from dmsync.transports.ssh_library import asyncssh

LOG: Final = logging.getLogger("dmsync.transports")
FILE_BYTES_MAX: Final = 4 * 1024 * 1024
LINE_CHARACTERS_MAX: Final = 32 * 1024
_VALUES: Final = frozenset({"dm-role", "dm-dots", "dm-user", "from"})
_FLAGS: Final = frozenset(
    {
        "cert-authority",
        # what these take away, this server never gives
        "restrict",
        "no-agent-forwarding",
        "no-port-forwarding",
        "no-pty",
        "no-user-rc",
        "no-x11-forwarding",
    }
)
_OPTION: Final = re.compile(r'([A-Za-z0-9-]+)(?:="((?:[^"\\]|\\")*)")?', re.ASCII)
_ADDRESS_PATTERN: Final = re.compile(r"[0-9a-fA-F:.*?]+", re.ASCII)
USER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
"""A user's name is a namespace."""


@dataclass(frozen=True)
class AuthorizedKey:
    """One line: a key (or authority) and what it may be used for."""

    key: asyncssh.SSHKey
    role: Role = Role.WRITE
    dots: tuple[str, ...] | None = None
    user: str | None = None
    """The one user name that the key is for; None: any."""
    from_addresses: str | None = None
    is_authority: bool = False

    def admits(self, user: str, address: str) -> bool:
        """Whether somebody at `address` with this key may be `user`."""
        if self.user is not None and self.user != user:
            return False
        return self.from_addresses is None or _is_from(self.from_addresses, address)


class BadKeyLine(ValueError):
    """A line that lets nobody in. `key` when it names one that is to be denied."""

    def __init__(self, why: str, key: asyncssh.SSHKey | None = None) -> None:
        super().__init__(why)
        self.key = key


def _is_from(patterns: str, address: str) -> bool:
    """Whether the address is in a list of address patterns and networks."""
    from asyncssh.misc import ip_address
    from asyncssh.pattern import HostPatternList

    return HostPatternList(patterns).matches("", address, ip_address(address))


def parse_line(line: str) -> AuthorizedKey:
    """Parse `[options] key-type base64 [comment]`.

    Raises:
        BadKeyLine: with the key where it could be read.
    """
    if len(line) > LINE_CHARACTERS_MAX:
        raise BadKeyLine("the line is too long")
    key = _import_key(line)
    if key is not None:
        return AuthorizedKey(key)
    options, rest = _split_options(line)
    key = _import_key(rest)
    if key is None:
        # The options may have been cut in the wrong place: deny any key that is in the line.
        raise BadKeyLine("no key that can be read", _find_key(line))
    try:
        return _authorized(key, options)
    except ValueError as exc:
        raise BadKeyLine(str(exc), key) from exc


def _import_key(text: str) -> asyncssh.SSHKey | None:
    try:
        return asyncssh.import_public_key(text)
    except (asyncssh.KeyImportError, ValueError):
        return None


def _find_key(line: str) -> asyncssh.SSHKey | None:
    words = line.split()
    for index in range(len(words) - 1):
        key = _import_key(" ".join(words[index : index + 2]))
        if key is not None:
            return key
    return None


def _split_options(line: str) -> tuple[list[tuple[str, str | None]], str]:
    """([(lower-case name, value or None)], what follows). Malformed options leave a bad rest."""
    options: list[tuple[str, str | None]] = []
    position = 0
    while found := _OPTION.match(line, position):
        name, value = found.group(1).lower(), found.group(2)
        options.append((name, None if value is None else value.replace('\\"', '"')))
        position = found.end()
        if line[position : position + 1] != ",":
            break
        position += 1
    else:
        return options, ""  # nothing that is an option where one has to be
    rest = line[position:]
    return options, rest.lstrip() if rest[:1].isspace() else ""


def _authorized(key: asyncssh.SSHKey, options: list[tuple[str, str | None]]) -> AuthorizedKey:
    """Raises ValueError for anything not understood."""
    given: dict[str, str | None] = {}
    for name, value in options:
        known = _VALUES if value is not None else _FLAGS
        if name not in known:
            raise ValueError(f"option {name} is not known, or needs a value, or has one")
        if name in given:
            raise ValueError(f"option {name} is given twice")
        given[name] = value
    return AuthorizedKey(
        key,
        role=_role(given.get("dm-role")),
        dots=_dots(given.get("dm-dots")),
        user=_user(given.get("dm-user")),
        from_addresses=_from(given.get("from")),
        is_authority="cert-authority" in given,
    )


def _role(value: str | None) -> Role:
    if value is None:
        return Role.WRITE
    if value not in ROLES:
        raise ValueError(f"dm-role is none of {', '.join(ROLES)}: {value!r}")
    return ROLES[value]


def _dots(value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = tuple(text.strip() for text in value.split(","))
    for text in texts:
        parse_dot_pattern(text, "")
    return texts


def _user(value: str | None) -> str | None:
    if value is not None and not USER_NAME.fullmatch(value):
        raise ValueError(f"dm-user is no user name: {value!r}")
    return value


def _from(value: str | None) -> str | None:
    """Names are refused: they are not looked up, so that `!name` would keep nobody out."""
    for pattern in () if value is None else value.split(","):
        address = pattern.removeprefix("!")
        if "/" in address:
            ip_network(address)
        elif not _ADDRESS_PATTERN.fullmatch(address):
            raise ValueError(f"from is no list of addresses: {value!r}")
    return value


class AuthorizedKeys:
    """The keys of a file, read again when the file has changed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._failure = ""
        self._by_key: dict[tuple[bytes, bool], list[AuthorizedKey]] = {}

    def refresh(self) -> None:
        """Read the file if it changed. A file that cannot be read or trusted lets nobody in."""
        try:
            state = _file_state(os.stat(self._path))
            if state == self._seen:
                return
            with open(self._path, "rb") as file:
                state = _file_state(os.fstat(file.fileno()))
                _check_private(os.fstat(file.fileno()))
                content = file.read(FILE_BYTES_MAX + 1)
            if len(content) > FILE_BYTES_MAX:
                raise StorageFailed(f"longer than {FILE_BYTES_MAX} bytes")
        except (OSError, StorageFailed) as exc:
            self._seen, self._by_key = None, {}
            if self._failure != str(exc):  # asked for at every request
                LOG.warning("authorized keys %s: %s: nobody may log in", self._path, exc)
            self._failure = str(exc)
            return
        self._failure = ""
        self._by_key = self._load(content.decode("utf-8", "replace"))
        self._seen = state

    def find(
        self, key: asyncssh.SSHKey, user: str, address: str, *, is_authority: bool
    ) -> AuthorizedKey | None:
        """The first line that lets `key` in as `user` from `address`."""
        entries = self._by_key.get((key.public_data, is_authority), ())
        return next((entry for entry in entries if entry.admits(user, address)), None)

    def _load(self, text: str) -> dict[tuple[bytes, bool], list[AuthorizedKey]]:
        by_key: dict[tuple[bytes, bool], list[AuthorizedKey]] = {}
        denied: set[bytes] = set()
        for number, line in _lines(text):
            try:
                entry = parse_line(line)
            except BadKeyLine as exc:
                LOG.warning("authorized keys %s, line %d denied: %s", self._path, number, exc)
                if exc.key is not None:
                    denied.add(exc.key.public_data)
                continue
            by_key.setdefault((entry.key.public_data, entry.is_authority), []).append(entry)
        return {identity: found for identity, found in by_key.items() if identity[0] not in denied}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _file_state(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _check_private(status: os.stat_result) -> None:
    """Whoever may write the file may let themselves in. Raises StorageFailed."""
    if not stat.S_ISREG(status.st_mode):
        raise StorageFailed("not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise StorageFailed(f"belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise StorageFailed("may be written by others")
