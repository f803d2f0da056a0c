"""Which host keys are trusted: known_hosts files as OpenSSH writes them, looked up by name.

Nothing here may fail open: what cannot be read is an error, what is not listed is unknown. Entries
for a host's address do not vouch for its name (whoever answers the name server could use them).
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from dmsync.errors import ConfigError, HostKeyRejected
from dmsync.storage.durable import (
    fsync_directory,
    make_directory_durable,
    storage_errors,
    write_all,
)
from dmsync.transports.ssh_library import asyncssh

FILE_BYTES_MAX: Final = 16 * 1024 * 1024
DEFAULT_PORT: Final = 22
_PLAIN_ALGORITHMS: Final[tuple[str, ...]] = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
_CERTIFICATE_ALGORITHMS: Final[tuple[str, ...]] = (
    "ssh-ed25519-cert-v01@openssh.com",
    "ecdsa-sha2-nistp256-cert-v01@openssh.com",
    "ecdsa-sha2-nistp384-cert-v01@openssh.com",
    "ecdsa-sha2-nistp521-cert-v01@openssh.com",
    "rsa-sha2-512-cert-v01@openssh.com",
    "rsa-sha2-256-cert-v01@openssh.com",
)


@dataclass(frozen=True)
class HostTrust:
    """What the files say about one host and port."""

    keys: tuple[asyncssh.SSHKey, ...]
    without_port: tuple[asyncssh.SSHKey, ...]
    """Keys listed for the host without its port: trusted, but no proof that another is wrong."""
    authorities: tuple[asyncssh.SSHKey, ...]
    revoked: tuple[asyncssh.SSHKey, ...]

    def for_asyncssh(self) -> tuple[Sequence[object], ...]:
        """The seven lists that asyncssh's `known_hosts` callable returns; no X.509."""
        trusted = (*self.keys, *self.without_port)
        return (trusted, self.authorities, self.revoked, (), (), (), ())

    def algorithms(self) -> list[str]:
        """What to offer: algorithms of the known keys first, as a server may have many keys."""
        known = {name.decode() for key in self.for_asyncssh()[0] for name in _algorithms(key)}
        offered = [name for name in _PLAIN_ALGORITHMS if name in known]
        offered += [name for name in _PLAIN_ALGORITHMS if name not in known]
        if self.authorities:
            offered = [*_CERTIFICATE_ALGORITHMS, *offered]
        return offered


def _algorithms(key: object) -> Iterable[bytes]:
    assert isinstance(key, asyncssh.SSHKey)
    return key.sig_algorithms


def known_host_name(host: str, port: int | None) -> str:
    """The name under which known_hosts lists a host: `host` or `[host]:port`."""
    return host if port in (None, DEFAULT_PORT) else f"[{host}]:{port}"


def fingerprint(key: asyncssh.SSHKey) -> str:
    """`SHA256:...` as OpenSSH shows it."""
    return key.get_fingerprint()


def known_hosts_line(host: str, port: int | None, key: asyncssh.SSHKey) -> str:
    """One line of a known_hosts file, without its newline."""
    kind, text = key.export_public_key("openssh").decode("ascii").split()[:2]
    return f"{known_host_name(host, port)} {kind} {text}"


def look_up_host(files: Iterable[str], host: str, port: int | None) -> HostTrust:
    """What `files` say about a host. Missing files say nothing.

    Raises:
        ConfigError: a file that cannot be read, or a line with a marker that is not understood.
    """
    name = host.lower()
    known = [_read_known_hosts(path) for path in files]
    keys, authorities, revoked = _match(known, known_host_name(name, port))
    without_port: list[asyncssh.SSHKey] = []
    if known_host_name(name, port) != name:
        plain, plain_authorities, plain_revoked = _match(known, name)
        authorities += plain_authorities
        revoked += plain_revoked
        without_port = plain if not keys else []
    return HostTrust(tuple(keys), tuple(without_port), tuple(authorities), tuple(revoked))


_Matched = tuple[list[asyncssh.SSHKey], list[asyncssh.SSHKey], list[asyncssh.SSHKey]]


def _match(known: Iterable[asyncssh.SSHKnownHosts], name: str) -> _Matched:
    """(keys, authorities, revoked keys) listed for a name."""
    keys: list[asyncssh.SSHKey] = []
    authorities: list[asyncssh.SSHKey] = []
    revoked: list[asyncssh.SSHKey] = []
    for hosts in known:
        matched = hosts.match(name, "", None)
        keys += matched[0]
        authorities += matched[1]
        revoked += matched[2]
    return keys, authorities, revoked


def _read_known_hosts(path: str) -> asyncssh.SSHKnownHosts:
    hosts = asyncssh.SSHKnownHosts()
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            hosts.load(entry)
        except (ValueError, IndexError) as exc:
            # A line that only adds trust may be skipped, as OpenSSH does; one that takes it away
            # (or might) must not be.
            if entry.startswith("@"):
                raise ConfigError(f"{path}, line {number}: {exc}") from exc
    return hosts


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as exc:
        raise ConfigError(f"cannot read known hosts {path}: {exc.strerror}") from exc
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"{path} is longer than {FILE_BYTES_MAX} bytes")
    return content.decode("utf-8", "replace")


def check_not_changed(trust: HostTrust, host: str, port: int | None, key: asyncssh.SSHKey) -> None:
    """Raises HostKeyRejected for a revoked key, or when other keys of this host are known."""
    presented = fingerprint(key)
    where = known_host_name(host, port)
    if key in trust.revoked:
        raise HostKeyRejected(
            f"the host key of {where} is revoked: {presented}", host=host, fingerprint=presented
        )
    if trust.keys:
        expected = [fingerprint(known) for known in trust.keys]
        raise HostKeyRejected(
            f"THE HOST KEY OF {where} HAS CHANGED: it shows {presented}, known is "
            f"{' or '.join(expected)}",
            hint="somebody may be listening in; if the change is known to be right, remove the "
            "old line from the known_hosts file that has it",
            host=host,
            fingerprint=presented,
            expected=expected,
        )


def unknown_host_error(host: str, port: int | None, key: asyncssh.SSHKey) -> HostKeyRejected:
    """For a host of which nothing is known."""
    presented = fingerprint(key)
    return HostKeyRejected(
        f"the host key of {known_host_name(host, port)} is not known: {presented}",
        hint=f"compare it with the server's own, then: --accept-host-key {presented}",
        host=host,
        fingerprint=presented,
    )


def remember_host(path: str, host: str, port: int | None, key: asyncssh.SSHKey) -> None:
    """Append a host's key to a known_hosts file (made with mode 0600). Durable on return.

    One write at the end of the file: two processes lose no line of each other, and a line torn by
    a crash is skipped by readers.

    Raises:
        StorageFull, StorageFailed: nothing is remembered.
    """
    line = known_hosts_line(host.lower(), port, key).encode() + b"\n"
    directory = os.path.dirname(path) or "."
    make_directory_durable(directory)
    with storage_errors(f"writing {path}"):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            write_all(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
    fsync_directory(directory)
