"""Connecting to a remote with the built-in SSH client.

The host key is always checked, against explicit files; the user's ssh configuration is not read.
An unknown key ends the connection before anything is said; when it is then accepted, it is
remembered first and a second connection is made, which must show that very key.
"""

import asyncio
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from dmsync.core.names import RemoteUrl
from dmsync.errors import (
    AccessDenied,
    ConfigError,
    DmError,
    HostKeyRejected,
    NetworkError,
    NotADmServer,
)
from dmsync.transports.host_keys import (
    DEFAULT_PORT,
    HostTrust,
    check_not_changed,
    fingerprint,
    known_hosts_line,
    look_up_host,
    remember_host,
    unknown_host_error,
)
from dmsync.transports.limited_stream import window_bytes
from dmsync.transports.memory_tuning import pad_heap
from dmsync.transports.remote_command import failure_of_silent_end, serve_command
from dmsync.transports.ssh_channel import BUFFERED_BYTES_MAX, ChannelStream
from dmsync.transports.ssh_library import TRANSPORT_OPTIONS, asyncssh
from dmsync.transports.ssh_settings import SshSettings
from dmsync.transports.streams import CLOSE_TIMEOUT_S

_EXIT_NEWS_TIMEOUT_S: Final = 5.0


class _UntrustedKey(Exception):
    """The server showed a key that no file vouches for."""

    def __init__(self, key: asyncssh.SSHKey) -> None:
        super().__init__()
        self.key = key


class _Client(asyncssh.SSHClient):
    """Remembers the key that the server showed when nothing vouches for it."""

    def __init__(self) -> None:
        self.untrusted_key: asyncssh.SSHKey | None = None

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self.untrusted_key = key
        return False


class ClientStream(ChannelStream, asyncssh.SSHClientSession[bytes]):
    """The near end of a channel; closes its connection with it."""

    def __init__(self, host: str, buffered_bytes_max: int = BUFFERED_BYTES_MAX) -> None:
        super().__init__(buffered_bytes_max)
        self._host = host
        self.connection: asyncssh.SSHClientConnection | None = None

    def exit_status_received(self, status: int) -> None:
        self.tail.exit_status = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        self.tail.exit_signal = signal

    async def _silent_end(self) -> DmError | None:
        if self.bytes_received == 0 and await self._closes():
            return failure_of_silent_end(self.tail, self._host, through_ssh=False)
        return None

    async def _closes(self) -> bool:
        """The exit status comes between the end of output and the close."""
        try:
            async with asyncio.timeout(_EXIT_NEWS_TIMEOUT_S):
                await self._closed.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """Send what is queued and close channel and connection."""
        await super().aclose()
        if self.connection is None:
            return
        self.connection.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.connection.wait_closed()
        except TimeoutError:
            self.connection.abort()


async def connect_ssh(url: RemoteUrl, settings: SshSettings) -> ClientStream:
    """A stream to `dm serve --stdio` on the host.

    Raises:
        HostKeyRejected: an unknown key that nobody accepts, a changed or revoked one.
        AccessDenied: the server takes none of our keys.
        NetworkError: unreachable, broke, or did not answer in time.
        NotADmServer: an SSH server that does not run commands for us.
        ConfigError: key or known_hosts files that cannot be used.
    """
    pad_heap()
    command = serve_command(url.path, settings.dm_command)
    try:
        return await _connect_and_run(url, settings, command)
    except _UntrustedKey as untrusted:
        await _settle_untrusted(url, settings, untrusted.key)
    return await _connect_and_run(url, settings, command, settled=True)


async def fetch_host_key(url: RemoteUrl, settings: SshSettings) -> tuple[str, str]:
    """(fingerprint, known_hosts line) of the key a host shows; nothing is trusted or stored.

    Raises:
        NetworkError: unreachable or no answer.
    """
    trust = look_up_host((), url.host, url.port)
    with _translated(url):
        async with asyncio.timeout(settings.connect_timeout_s):
            key = await asyncssh.get_server_host_key(
                url.host,
                url.port or DEFAULT_PORT,
                server_host_key_algs=trust.algorithms(),
                config=None,
            )
    if key is None:
        raise NetworkError(f"{url.host} showed no host key", host=url.host)
    return fingerprint(key), known_hosts_line(url.host, url.port, key)


def host_is_known(url: RemoteUrl, settings: SshSettings) -> bool:
    """Whether some key or authority is known for the host. Raises ConfigError."""
    trust = look_up_host(settings.all_known_hosts_files, url.host, url.port)
    return bool(trust.keys or trust.without_port or trust.authorities)


async def _settle_untrusted(url: RemoteUrl, settings: SshSettings, key: asyncssh.SSHKey) -> None:
    """Remember the key if it is accepted and not known by now. Raises HostKeyRejected."""
    trust = look_up_host(settings.all_known_hosts_files, url.host, url.port)
    if key in trust.for_asyncssh()[0] and key not in trust.revoked:
        return  # another process has just remembered it
    check_not_changed(trust, url.host, url.port, key)
    shown = fingerprint(key)
    if settings.accept_host_key is not None:
        is_accepted = settings.accept_host_key == shown
    elif settings.on_unknown_host is not None:
        is_accepted = await asyncio.to_thread(settings.on_unknown_host, url.host, shown)
    else:
        is_accepted = False
    if not is_accepted:
        raise unknown_host_error(url.host, url.port, key)
    remember_host(settings.accepted_hosts_file, url.host, url.port, key)


async def _connect_and_run(
    url: RemoteUrl, settings: SshSettings, command: str, *, settled: bool = False
) -> ClientStream:
    trust = look_up_host(settings.all_known_hosts_files, url.host, url.port)
    client = _Client()
    try:
        with _translated(url):
            async with asyncio.timeout(settings.connect_timeout_s):
                return await _open(url, settings, command, trust, client)
    except HostKeyRejected as exc:
        if client.untrusted_key is None:
            raise
        if settled:  # it showed another key than a moment ago
            check_not_changed(trust, url.host, url.port, client.untrusted_key)
            raise unknown_host_error(url.host, url.port, client.untrusted_key) from exc
        raise _UntrustedKey(client.untrusted_key) from exc


async def _open(
    url: RemoteUrl, settings: SshSettings, command: str, trust: HostTrust, client: _Client
) -> ClientStream:
    connection = await asyncssh.connect(
        url.host,
        url.port or DEFAULT_PORT,
        username=url.user or _user_name(),
        client_factory=lambda: client,
        known_hosts=lambda host, addr, port: trust.for_asyncssh(),
        server_host_key_algs=trust.algorithms(),
        x509_trusted_certs=[],
        x509_trusted_cert_paths=[],
        **_login_options(settings),
        **_client_options(settings),
    )
    try:
        stream = ClientStream(url.host, _window(settings) or BUFFERED_BYTES_MAX)
        await connection.create_session(lambda: stream, command, request_pty=False)
    except BaseException:
        connection.abort()
        raise
    stream.connection = connection
    return stream


def _client_options(settings: SshSettings) -> dict[str, Any]:
    return {
        **TRANSPORT_OPTIONS,
        "window": _window(settings) or TRANSPORT_OPTIONS["window"],
        "preferred_auth": ["publickey"],
        "password_auth": False,
        "kbdint_auth": False,
        "host_based_auth": False,
        "gss_kex": False,
        "gss_auth": False,
        # a server that lets us in without asking for a key is not the one that knows our key
        "disable_trivial_auth": True,
        "env": (),
        "send_env": (),
    }


def _window(settings: SshSettings) -> int | None:
    """What the server may send ahead when a rate is to be held; None: as much as is good."""
    limit = settings.limit_bytes_per_s
    return None if limit is None else min(window_bytes(limit), TRANSPORT_OPTIONS["window"])


def _login_options(settings: SshSettings) -> dict[str, Any]:
    """The keys to log in with: the one that is named, else the agent's and ~/.ssh/id_*."""
    if settings.key_file is None:
        return {}
    path = os.path.expanduser(settings.key_file)
    try:
        key = asyncssh.read_private_key(path)
    except asyncssh.KeyEncryptionError:
        return _through_agent(path)
    except OSError as exc:
        raise ConfigError(f"cannot read the key {path}: {exc.strerror}") from exc
    except asyncssh.KeyImportError as exc:
        if "passphrase" in str(exc).lower():  # so asyncssh speaks of keys in OpenSSH's own form
            return _through_agent(path)
        raise ConfigError(f"{path} is no private key: {exc}") from exc
    return {"client_keys": [key], "agent_path": None}


def _through_agent(path: str) -> dict[str, Any]:
    """A key with a passphrase is used through the agent that has it, found by its public half."""
    try:
        public = asyncssh.read_public_key(f"{path}.pub")
    except (OSError, asyncssh.KeyImportError) as exc:
        raise ConfigError(
            f"the key {path} has a passphrase, and {path}.pub cannot be read",
            hint="load the key into ssh-agent and keep its .pub file beside it",
        ) from exc
    return {"client_keys": [], "agent_identities": [public]}


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as exc:
        raise ConfigError("no user name is known", hint="write ssh://USER@HOST") from exc


@contextmanager
def _translated(url: RemoteUrl) -> Iterator[None]:
    """The one place where asyncssh's failures to connect get our types."""
    where: dict[str, Any] = {"host": url.host, "port": url.port or DEFAULT_PORT}
    try:
        yield
    except DmError:
        raise
    except asyncssh.HostKeyNotVerifiable as exc:
        raise HostKeyRejected(
            f"the host key of {url.host} is refused: {exc.reason}", **where
        ) from exc
    except asyncssh.PermissionDenied as exc:
        raise AccessDenied(
            f"{url.host} refused the login of {url.user or 'this user'}: {exc.reason}",
            hint="is the public half of your key (DM_SSH_KEY) authorised there?",
            **where,
        ) from exc
    except asyncssh.ChannelOpenError as exc:
        raise NotADmServer(f"{url.host} runs no command for us: {exc.reason}", **where) from exc
    except (
        asyncssh.ProtocolError,
        asyncssh.ProtocolNotSupported,
        asyncssh.KeyExchangeFailed,
    ) as exc:
        raise NotADmServer(
            f"{url.host} is no SSH server we can use: {exc.reason}", **where
        ) from exc
    except asyncssh.DisconnectError as exc:
        raise NetworkError(f"connecting to {url.host}: {exc.reason}", **where) from exc
    except TimeoutError as exc:
        raise NetworkError(f"{url.host} did not answer in time", **where) from exc
    except OSError as exc:
        raise NetworkError(
            f"cannot connect to {url.host}: {exc.strerror or exc}", errno=exc.errno, **where
        ) from exc
    except (asyncssh.Error, ValueError) as exc:  # options that asyncssh refuses
        raise ConfigError(f"connecting to {url.host}: {exc}", **where) from exc
