"""Names of dots, branches, subdots, tags and remotes, and where remotes are (README, "Names")."""

import re
from typing import Final, Literal

from dmsync.core.values import plain_value_type
from dmsync.errors import InvalidName

NAME_CHARACTERS_MAX: Final = 64
MADE_NAME_CHARACTERS_MAX: Final = 128
"""Names that dm makes itself (`X-DIVERGED-time`) may be longer than those a user may give."""
URL_CHARACTERS_MAX: Final = 4096
PATTERN: Final = "^[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$"
DEFAULT_SUBDOT: Final = "__default__"
ROOT_SUBDOT: Final = "__root__"
RESERVED_SUBDOTS: Final = (DEFAULT_SUBDOT, ROOT_SUBDOT)

_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]*", re.ASCII)
_TAG: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
_LIKE_AN_ID: Final = re.compile(r"[0-9a-fA-F]{4,64}", re.ASCII)
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,253})", re.ASCII)
_IPV6: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,32})?", re.ASCII)
_PASSWORD: Final = re.compile(r"(^|://)([^/@:\s]*):(?!//)[^\s]*@", re.ASCII)
"""Up to the last @: a password may hold one, and slashes."""
_UNSAFE_IN_PATH: Final = re.compile(r"[\x00-\x20\x7f\"'`\\$;&|<>(){}*?!#\u0080-\u00a0\u2028\u2029]")


def shown(text: str) -> str:
    """`text` quoted for a message: control characters escaped, cut to a sensible length."""
    safe = text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return f'"{safe[:80]}…"' if len(safe) > 80 else f'"{safe}"'


def _check(what: str, name: str, pattern: re.Pattern[str], length_max: int) -> str:
    if not name:
        raise InvalidName(f"invalid {what} name {shown(name)}: it is empty")
    if len(name) > length_max:
        raise InvalidName(f"invalid {what} name {shown(name)}: longer than {length_max} characters")
    if not pattern.fullmatch(name):
        allowed = PATTERN if pattern is _NAME else PATTERN.replace("_-]", "_.-]")
        raise InvalidName(f"invalid {what} name {shown(name)}: should match pattern {allowed}")
    return name


def _check_no_revision(what: str, name: str) -> str:
    """Refuse names that the revision syntax would read as something else."""
    if _LIKE_AN_ID.fullmatch(name):
        raise InvalidName(f"invalid {what} name {shown(name)}: it looks like a commit id")
    if name.upper() == "HEAD":
        raise InvalidName(f"invalid {what} name {shown(name)}: it means the current commit")
    return name


def check_dot_name(name: str) -> str:
    """Return `name`, or raise InvalidName."""
    return _check("dot", name, _NAME, NAME_CHARACTERS_MAX)


def check_namespace(name: str) -> str:
    """Return `name`, or raise InvalidName."""
    return _check("namespace", name, _NAME, NAME_CHARACTERS_MAX)


def check_branch_name(name: str, *, made_by_dm: bool = False) -> str:
    """Return `name`, or raise InvalidName; what reads as a revision is refused.

    `made_by_dm` also allows the longer names that dm makes or that come from a peer.
    """
    length_max = MADE_NAME_CHARACTERS_MAX if made_by_dm else NAME_CHARACTERS_MAX
    return _check_no_revision("branch", _check("branch", name, _NAME, length_max))


def check_tag_name(name: str) -> str:
    """Return `name`, or raise InvalidName. Tags may hold dots, but no `..` and none at the end."""
    _check("tag", name, _TAG, NAME_CHARACTERS_MAX)
    if ".." in name or name.endswith("."):
        raise InvalidName(f"invalid tag name {shown(name)}: dots mean a range of commits")
    return _check_no_revision("tag", name)


def full_name(namespace: str, name: str) -> str:
    """`namespace/name`, or the name alone in the store's own namespace, which is empty."""
    return f"{namespace}/{name}" if namespace else name


def check_remote_name(name: str) -> str:
    """Return `name`, or raise InvalidName."""
    return _check("remote", name, _NAME, NAME_CHARACTERS_MAX)


def check_subdot_name(name: str) -> str:
    """Return `name`, or raise InvalidName. Of names beginning `__` only the reserved ones exist."""
    if name in RESERVED_SUBDOTS:
        return name
    if name.startswith("__"):
        raise InvalidName(f"invalid subdot name {shown(name)}: names beginning __ are reserved")
    return _check("subdot", name, _NAME, NAME_CHARACTERS_MAX)


def check_ref_name(name: str) -> str:
    """Return `branch/x`, `tag/x`, `remote/R/x` or `stash/x`, or raise InvalidName."""
    space, _, rest = name.partition("/")
    match space:
        case "branch":
            check_branch_name(rest, made_by_dm=True)
        case "tag":
            check_tag_name(rest)
        case "stash":
            _check("stash", rest, _NAME, MADE_NAME_CHARACTERS_MAX)
        case "remote":
            remote, _, branch = rest.partition("/")
            check_remote_name(remote)
            if branch.startswith("tag/"):
                check_tag_name(branch.removeprefix("tag/"))
            else:
                check_branch_name(branch, made_by_dm=True)
        case _:
            raise InvalidName(f"invalid ref name {shown(name)}: no branch, tag, remote or stash")
    return name


# --- [namespace/]dot[@branch][.subdot] ----------------------------------------------------------


@plain_value_type
class DotName:
    """A parsed dot expression; None where a part was left out."""

    dot: str
    namespace: str | None = None
    branch: str | None = None
    subdot: str | None = None

    def __str__(self) -> str:
        return "".join(
            (
                f"{self.namespace}/" if self.namespace is not None else "",
                self.dot,
                f"@{self.branch}" if self.branch is not None else "",
                f".{self.subdot}" if self.subdot is not None else "",
            )
        )


def parse_dot_name(text: str) -> DotName:
    """Parse `[namespace/]dot[@branch][.subdot]`. Raises InvalidName."""
    rest, has_subdot, subdot = text.partition(".")
    rest, has_branch, branch = rest.partition("@")
    namespace, has_namespace, dot = rest.rpartition("/")
    check_dot_name(dot)
    if has_namespace:
        check_namespace(namespace)
    if has_branch:
        check_branch_name(branch, made_by_dm=True)
    if has_subdot:
        check_subdot_name(subdot)
    return DotName(
        dot,
        namespace if has_namespace else None,
        branch if has_branch else None,
        subdot if has_subdot else None,
    )


# --- where a remote is --------------------------------------------------------------------------


@plain_value_type
class RemoteUrl:
    """Where a remote's store is. `path` None: the remote's own default store. `host` of an IPv6
    address has no brackets."""

    kind: Literal["ssh", "local"]
    host: str = ""
    user: str | None = None
    port: int | None = None
    path: str | None = None

    def __str__(self) -> str:
        """A form that parses back to the same value."""
        if self.kind == "local":
            assert self.path is not None
            return self.path
        user = f"{self.user}@" if self.user is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port is not None else ""
        return f"ssh://{user}{host}{port}{self.path or ''}"


def without_password(text: str) -> str:
    """`text` with what stands where a URL has its password left out: it is shown or logged."""
    return _PASSWORD.sub(r"\1\2:***@", text)


def _bad_url(text: str, why: str) -> InvalidName:
    return InvalidName(f"invalid remote URL {shown(without_password(text))}: {why}")


def parse_remote_url(text: str) -> RemoteUrl:
    """Parse `ssh://[user@]host[:port][/path]`, `[user@]host`, `[user@]host:PORT`,
    `[user@]host:/path` or a local path (beginning with `/`, `./`, `../` or `~`).

    Nothing that a shell or an ssh command line could read as an option or as syntax gets through.

    Raises:
        InvalidName: anything else.
    """
    if not text or len(text) > URL_CHARACTERS_MAX:
        raise _bad_url(text, "it is empty" if not text else "it is too long")
    if text in (".", "..") or text.startswith(("/", "./", "../", "~")):
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise _bad_url(text, "control characters are not allowed")
        return RemoteUrl("local", path=text)
    scheme, has_scheme, rest = text.partition("://")
    if has_scheme:
        if scheme != "ssh":
            raise _bad_url(text, "only ssh:// and local paths are understood")
        authority, slash, path = rest.partition("/")
        user, host, port_text = _split_authority(text, authority)
        return RemoteUrl("ssh", host, user, _port(text, port_text), _path(text, slash + path))
    user, host, suffix = _split_authority(text, text)
    if suffix is not None and suffix.startswith("/"):
        return RemoteUrl("ssh", host, user, None, _path(text, suffix))
    return RemoteUrl("ssh", host, user, _port(text, suffix), None)


def _split_authority(text: str, authority: str) -> tuple[str | None, str, str | None]:
    """(user, host, what follows the colon) of `[user@]host[:suffix]`."""
    before_path = authority.partition("/")[0]
    user: str | None = None
    if "@" in before_path:
        user, _, authority = authority.partition("@")
        if ":" in user:
            raise _bad_url(text, "a password does not belong in a URL")
        if not _USER.fullmatch(user):
            raise _bad_url(text, "the user name is not valid")
    if authority.startswith("["):
        host, closing, suffix = authority[1:].partition("]")
        if not closing or not _IPV6.fullmatch(host) or ":" not in host:
            raise _bad_url(text, "the address in brackets is not valid")
        if suffix and not suffix.startswith(":"):
            raise _bad_url(text, "only a port or a path may follow the host")
        return user, host, suffix[1:] if suffix else None
    host, colon, suffix = authority.partition(":")
    if not _HOST.fullmatch(host):
        raise _bad_url(text, "the host name is not valid")
    return user, host, suffix if colon else None


def _port(text: str, digits: str | None) -> int | None:
    if digits is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", digits, re.ASCII) or not 0 < int(digits) < 65536:
        raise _bad_url(text, "after the colon comes a port (1 to 65535) or an absolute path")
    return int(digits)


def _path(text: str, path: str) -> str | None:
    if path in ("", "/"):
        return None
    if _UNSAFE_IN_PATH.search(path):
        raise _bad_url(text, "the path holds control characters, white space, quotes or the like")
    return path
