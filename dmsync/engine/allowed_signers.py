"""Whose signatures count: the allowed-signers file of ssh-keygen(1), and matching keys with it.

A line is `principals [options] key`; options are cert-authority, namespaces=, valid-after= and
valid-before=. Unlike ssh-keygen, which passes over a line it cannot read, this refuses the file:
a signer who silently does not count is noticed too late.
"""

import calendar
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmsync.core.sshsig import NAMESPACE, SshSignature
from dmsync.errors import ConfigError

if TYPE_CHECKING:
    import asyncssh
    from asyncssh.public_key import SSHOpenSSHCertificate

FILE_BYTES_MAX: Final = 4 * 1024 * 1024
_WORD: Final = re.compile(r'\s*((?:"[^"]*"|[^\s"])+)(?:\s+|$)')
_OPTION: Final = re.compile(r'([A-Za-z-]+)(?:=("[^"]*"|[^,"]*))?(?:,|$)')
_TIME: Final = re.compile(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(\d\d)?)?(Z?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class AllowedSigner:
    """One line: `principals` and `namespaces` are pattern lists, times seconds since 1970. With
    `is_authority` the key signs certificates, and theirs are the keys that count."""

    principals: str
    key: "asyncssh.SSHKey"
    is_authority: bool = False
    namespaces: str = "*"
    valid_after_s: float | None = None
    valid_before_s: float | None = None


def read_allowed_signers(path: str) -> tuple[AllowedSigner, ...]:
    """Raises ConfigError naming the file and line."""
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the allowed signers {path}: {exc.strerror}") from exc
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"the allowed signers {path} are longer than {FILE_BYTES_MAX} bytes")
    found = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            try:
                found.append(_signer(text))
            except ValueError as exc:
                raise ConfigError(
                    f"{path}, line {number}: {exc}", hint="principals [options] key"
                ) from exc
    return tuple(found)


def _signer(line: str) -> AllowedSigner:
    import asyncssh

    first = _WORD.match(line)
    if first is None:
        raise ValueError("no principals")
    principals, rest = first[1].replace('"', ""), line[first.end() :]
    try:
        return AllowedSigner(principals, asyncssh.import_public_key(rest))
    except asyncssh.KeyImportError:
        second = _WORD.match(rest)
    if second is None:
        raise ValueError("no key")
    try:
        key = asyncssh.import_public_key(rest[second.end() :])
    except asyncssh.KeyImportError as exc:
        raise ValueError("no key that can be read") from exc
    options = _options(second[1])
    after, before = options.get("valid-after"), options.get("valid-before")
    return AllowedSigner(
        principals,
        key,
        "cert-authority" in options,
        options.get("namespaces", "*"),
        None if after is None else _time(after),
        None if before is None else _time(before),
    )


def _options(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _OPTION.match(text, position)
        if match is None:
            raise ValueError("options that cannot be read")
        name, value = match[1].lower(), match[2]
        takes_value = name in ("namespaces", "valid-after", "valid-before")
        if name in found or (not takes_value and name != "cert-authority"):
            raise ValueError(f"option {name} is unknown or given twice")
        if takes_value != (value is not None):
            raise ValueError(f"option {name} {'needs' if takes_value else 'takes no'} value")
        found[name] = (value or "").strip('"')
        position = match.end()
    return found


def _time(text: str) -> float:
    """`YYYYMMDD[HHMM[SS]][Z]` in seconds since 1970; local time unless it ends in Z."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r:.40} is not a time like 20261121 or 202611211200Z")
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    parts = (year, month, day, hour, minute, second, 0, 0, -1)
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second < 61):
        raise ValueError(f"{text!r:.40} is no time of the calendar")
    return calendar.timegm(parts) if match[7] else time.mktime(parts)


# --- matching ------------------------------------------------------------------------------------


def matches(
    signer: AllowedSigner,
    signature: SshSignature,
    certificate: "SSHOpenSSHCertificate | None",
    now_s: float,
) -> tuple[str, str]:
    """(principal, "") when the line allows the signature's key at `now_s`, else ("", why not);
    both empty when the line is about another key."""
    if signer.is_authority:
        if certificate is None or certificate.signing_key != signer.key:
            return "", ""
        reason = _barred(signer, now_s)
        return ("", reason) if reason else _certified(signer, certificate)
    import asyncssh

    # as ssh-keygen: a certificate counts by its authority, even when its key alone would
    if certificate is not None or asyncssh.import_public_key(signature.key_line) != signer.key:
        return "", ""
    reason = _barred(signer, now_s)
    return ("", reason) if reason else (signer.principals, "")


def _barred(signer: AllowedSigner, now_s: float) -> str:
    if not matches_patterns(NAMESPACE, signer.namespaces):
        return f"its key is allowed for other namespaces only ({signer.namespaces})"
    if signer.valid_after_s is not None and now_s < signer.valid_after_s:
        return "its key is not allowed yet"
    if signer.valid_before_s is not None and now_s >= signer.valid_before_s:
        return "its key is not allowed any more"
    return ""


def _certified(signer: AllowedSigner, certificate: "SSHOpenSSHCertificate") -> tuple[str, str]:
    """The first principal of a certificate that the line admits. One without principals, good for
    everybody as OpenSSH makes them, is good for nobody here, as in ssh-keygen."""
    from asyncssh.public_key import CERT_TYPE_USER

    for principal in certificate.principals:
        if matches_patterns(principal, signer.principals):
            try:
                certificate.validate(CERT_TYPE_USER, principal)
            except ValueError as exc:
                return "", f"its certificate does not count: {exc}"
            return principal, ""
    return "", "its certificate names no allowed principal"


def matches_patterns(text: str, patterns: str) -> bool:
    """Whether a comma-separated list of patterns (`*`, `?`, `!` before what must not match)
    matches `text`, as in ssh_config(5)."""
    found = False
    for pattern in patterns.split(","):
        negated = pattern.startswith("!")
        parts = re.split(r"([*?])", pattern.removeprefix("!"))
        regex = "".join({"*": ".*", "?": "."}.get(part, re.escape(part)) for part in parts)
        if re.fullmatch(regex, text, re.DOTALL):
            if negated:
                return False
            found = True
    return found
