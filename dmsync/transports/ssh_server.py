"""This store's own SSH server: public keys only, and one thing to run, `dm serve --stdio`.

No shell, no files, no forwarding, no terminal, no environment. Users exist only in the
authorized_keys file: nothing is looked up in the system, so that unknown users cost and see the
same as known ones.
"""

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dmsync.engine.access import (
    Access,
    IsCollaborator,
    access_for,
    shared_with_nobody,
)
from dmsync.engine.ports import ByteStream
from dmsync.engine.refusals import note
from dmsync.errors import AccessDenied, ConfigError, DmError
from dmsync.transports.admission import Admission, ServerLimits
from dmsync.transports.authorized_keys import USER_NAME, AuthorizedKey, AuthorizedKeys
from dmsync.transports.memory_tuning import pad_heap
from dmsync.transports.remote_command import SUBSYSTEM, requested_home
from dmsync.transports.server_host_key import read_or_make_host_key
from dmsync.transports.ssh_channel import ChannelStream
from dmsync.transports.ssh_library import TRANSPORT_OPTIONS, asyncssh

LOG: Final = logging.getLogger("dmsync.transports")
_OFFERED_KEYS_MAX: Final = 8
"""Of a refused login so many keys are told."""

Handler = Callable[[ByteStream, Access], Awaitable[None]]
"""Serves one session; the stream is closed after it."""


@dataclass(frozen=True)
class ServerSettings:
    """What a server serves, where, and to whom.

    `owner` is the account that owns the store. `store_home`: a client that asks for a store by
    path must mean this one.
    """

    host: str
    port: int
    host_key_file: str
    authorized_keys_file: str
    owner: str
    store_home: str | None = None
    is_collaborator: IsCollaborator = shared_with_nobody
    limits: ServerLimits = field(default_factory=ServerLimits)


async def serve(
    settings: ServerSettings,
    handler: Handler,
    on_ready: Callable[[str, int], None],
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then sessions get a few seconds to finish.

    `on_ready(host, port)` is called once the server listens; `port` is the real one.

    Raises:
        ConfigError: the host key cannot be used, or the address cannot be listened on.
    """
    pad_heap()
    stopping = stop if stop is not None else asyncio.Event()
    server = _Server(settings, handler)
    listener = await _listen(settings, server)
    restore_signals = _stop_on_signals(stopping)
    try:
        on_ready(settings.host, listener.get_port())
        await stopping.wait()
    finally:
        listener.close()
        await server.finish()
        restore_signals()


async def _listen(settings: ServerSettings, server: "_Server") -> asyncssh.SSHAcceptor:
    key = read_or_make_host_key(settings.host_key_file)
    try:
        return await asyncssh.listen(
            settings.host,
            settings.port,
            server_factory=lambda: _Connection(server),
            server_host_keys=[key],
            login_timeout=settings.limits.login_timeout_s,
            **_server_options(),
        )
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {exc.strerror or exc}"
        ) from exc


def _server_options() -> dict[str, Any]:
    return {
        **TRANSPORT_OPTIONS,
        "public_key_auth": True,
        "password_auth": False,
        "kbdint_auth": False,
        "host_based_auth": False,
        "gss_host": None,
        "gss_kex": False,
        "gss_auth": False,
        "x509_trusted_certs": None,
        "x509_trusted_cert_paths": [],
        "rdns_lookup": False,
        "allow_pty": False,
        "line_editor": False,
        "sftp_factory": None,
        "allow_scp": False,
        "authorized_client_keys": None,
    }


def _stop_on_signals(stopping: asyncio.Event) -> Callable[[], None]:
    """Returns what puts the former handlers back."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            loop.add_signal_handler(number, stopping.set)
    except (RuntimeError, ValueError):  # not the main thread
        return lambda: None

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    return restore


class _Server:
    """What the connections of one listener share."""

    def __init__(self, settings: ServerSettings, handler: Handler) -> None:
        self.settings = settings
        self.keys = AuthorizedKeys(settings.authorized_keys_file)
        self.admission = Admission(settings.limits)
        self._handler = handler
        self.connections: set[_Connection] = set()
        self.connections_of: Counter[str] = Counter()
        """Connections that are logged in, by user."""
        self._sessions: set[asyncio.Task[None]] = set()

    def start_session(self, stream: "_ServerStream", access: Access) -> None:
        """Serve a session in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._run(stream, access))
        self._sessions.add(task)
        task.add_done_callback(self._session_done)

    async def _run(self, stream: "_ServerStream", access: Access) -> None:
        try:
            await self._handler(stream, access)
            stream.exit_status = 0
        except DmError as exc:
            stream.say(f"dm: error: {exc.message}")
            stream.exit_status = exc.exit_code
            LOG.info("session of %s: %s: %s", access.user, exc.code, exc.message)
        finally:
            await stream.aclose()

    def _session_done(self, task: "asyncio.Task[None]") -> None:
        """A bug in one session is logged and ends that session only."""
        self._sessions.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            LOG.error("a session failed unexpectedly", exc_info=bug)

    async def finish(self) -> None:
        """Let sessions end, then close everything."""
        if self._sessions:
            grace_s = self.settings.limits.shutdown_grace_s
            await asyncio.wait(set(self._sessions), timeout=grace_s)
        for task in set(self._sessions):
            task.cancel()
        for connection in set(self.connections):
            connection.close()
        if self._sessions:
            await asyncio.wait(set(self._sessions), timeout=1.0)


@dataclass(frozen=True)
class _Login:
    """Who a client is: by which line of the file, and by which key (of an authority: its own)."""

    user: str
    entry: AuthorizedKey
    key: asyncssh.SSHKey
    is_authority: bool

    @property
    def fingerprint(self) -> str:
        return str(self.key.get_fingerprint())


class _Connection(asyncssh.SSHServer):
    """One client: admission, login, and what it asks to run."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._connection: asyncssh.SSHServerConnection | None = None
        self._address = ""
        self._is_admitted = False
        self._is_authenticated = False
        self._asked: _Login | None = None
        self._login: _Login | None = None
        self._offered: list[tuple[str, str]] = []
        """User and fingerprint of keys that were not let in."""
        self.sessions_count = 0
        self._served_count = 0

    # --- admission ----------------------------------------------------------------------------

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        peer = conn.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        self._is_admitted = self._server.admission.admits(self._address, self._give_way)
        if not self._is_admitted:
            note("refused", who="", source=self._address, why="too-many-connections")
            conn.abort()
            return
        self._server.connections.add(self)
        self._server.keys.refresh()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_admitted:
            return
        self._is_admitted = False
        self._server.connections.discard(self)
        self._server.admission.closed(
            self._address, self._give_way, was_authenticated=self._is_authenticated
        )
        if self._is_authenticated and self._login is not None:
            self._server.connections_of[self._login.user] -= 1
        elif self._offered:
            self._note_refused_login()

    def _note_refused_login(self) -> None:
        for user in sorted({user for user, _ in self._offered}):
            keys = ",".join(dict.fromkeys(key for name, key in self._offered if name == user))
            note("refused", who=user, key=keys, source=self._address, verb="login",
                 why="key-not-authorized")  # fmt: skip

    def _give_way(self) -> None:
        """Others wait to log in, and this one has taken longer."""
        self._is_admitted = False
        self._server.connections.discard(self)
        note("refused", who="", source=self._address, why="login-too-slow")
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()

    # --- login --------------------------------------------------------------------------------

    def begin_auth(self, username: str) -> bool:
        return True  # everybody has to log in

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._admit(username, key, is_authority=False)

    def validate_ca_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._admit(username, key, is_authority=True)

    def _admit(self, user: str, key: asyncssh.SSHKey, *, is_authority: bool) -> bool:
        """Remember the line that lets this key in.

        asyncssh asks again, without a pause in between, when it checks the signature: the last
        answer before the login is done is that of the key that signed.
        """
        entry = self._server.keys.find(key, user, self._address, is_authority=is_authority)
        if entry is None or not self._is_namespace(user):
            self._asked = None
            if len(self._offered) < _OFFERED_KEYS_MAX:
                self._offered.append((user, key.get_fingerprint()))
            return False
        self._asked = _Login(user, entry, key, is_authority=is_authority)
        return True

    def _is_namespace(self, user: str) -> bool:
        """A user's dots live in the namespace of that name; the owner's name need not be one."""
        return user == self._server.settings.owner or USER_NAME.fullmatch(user) is not None

    def auth_completed(self) -> None:
        self._is_authenticated = True
        self._login = self._asked
        self._server.admission.authenticated(self._address, self._give_way)
        if self._login is not None:
            self._count_user(self._login)
        self._close_unless_used()

    def _count_user(self, login: "_Login") -> None:
        """Nobody takes all the places: others are served while one user opens connections."""
        of_user = self._server.connections_of
        of_user[login.user] += 1
        if of_user[login.user] <= self._server.settings.limits.connections_per_user_max:
            return
        who = f"{login.user} {login.fingerprint}"
        note("refused", who=who, source=self._address, why="too-many-connections-of-one-user")
        assert self._connection is not None
        self._connection.disconnect(
            asyncssh.DISC_TOO_MANY_CONNECTIONS, "too many connections of this user"
        )

    def _close_unless_used(self) -> None:
        """A connection without a session costs a place: it gets as long as a login does."""
        timeout_s = self._server.settings.limits.login_timeout_s
        asyncio.get_running_loop().call_later(timeout_s, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self._served_count == 0:
            self.close()

    def access(self) -> Access:
        """What the client may do. Raises AccessDenied."""
        assert self._connection is not None
        user = self._connection.get_extra_info("username")
        if self._login is None or self._login.user != user:
            raise AccessDenied("not logged in")
        login = replace(self._login, entry=self._entry_now(self._login))
        entry = login.entry
        settings = self._server.settings
        access = access_for(
            user,
            entry.role,
            entry.dots,
            owner=settings.owner,
            is_collaborator=settings.is_collaborator,
        )
        return replace(
            access,
            fingerprint=login.fingerprint,
            login=user,
            address=self._address,
            is_valid=lambda: self._is_unchanged(login),
        )

    def _entry_now(self, login: _Login) -> AuthorizedKey:
        """The line that lets the client in today. Raises AccessDenied."""
        keys = self._server.keys
        keys.refresh()
        entry = keys.find(login.key, login.user, self._address, is_authority=login.is_authority)
        if entry is None:
            raise AccessDenied("the key is not authorized any more")
        return entry

    def _is_unchanged(self, login: _Login) -> bool:
        """May the client still do what it might when its session began? May be called in any
        thread."""
        try:
            return self._entry_now(login) == login.entry
        except AccessDenied:
            return False

    def note_refused(self, what: str) -> None:
        """Say that the client asked for something that is not given here."""
        who = f"{self._login.user} {self._login.fingerprint}" if self._login else ""
        note("refused", who=who, source=self._address, verb="session", why=what)

    # --- sessions -----------------------------------------------------------------------------

    def session_requested(self) -> "_ServerStream":
        if self.sessions_count >= self._server.settings.limits.sessions_per_connection_max:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, "too many sessions on one connection"
            )
        self.sessions_count += 1
        return _ServerStream(self)

    def session_ended(self) -> None:
        """One session less."""
        self.sessions_count -= 1

    def start(self, stream: "_ServerStream") -> None:
        """Begin to serve a session. Raises AccessDenied."""
        self._server.start_session(stream, self.access())
        self._served_count += 1

    def served(self) -> None:
        """A session that was begun is over."""
        self._served_count -= 1
        if self._served_count == 0:
            self._close_unless_used()

    def check_home(self, home: str | None) -> None:
        """Raises AccessDenied when the client means another store."""
        own = self._server.settings.store_home
        if home is None or own is None:
            return
        if os.path.realpath(home) != os.path.realpath(own):
            raise AccessDenied("this dm server serves one store, and not the one in the URL's path")


class _ServerStream(ChannelStream, asyncssh.SSHServerSession[bytes]):
    """The far end of a channel."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__()
        self._connection = connection
        self._refusal = ""
        self._is_served = False
        self.exit_status = 1

    # --- what the client asks for: the answer is given in session_started ------------------------

    def exec_requested(self, command: str) -> bool:
        try:
            self._connection.check_home(requested_home(command))
        except AccessDenied as exc:
            self._refusal = exc.message
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        if subsystem != SUBSYSTEM:
            self._refusal = f"only the subsystem {SUBSYSTEM} is served here"
        return True

    def shell_requested(self) -> bool:
        self._refusal = "this is a dm server: there is no shell"
        return True

    def session_started(self) -> None:
        if not self._refusal:
            try:
                self._connection.start(self)
                self._is_served = True
            except (AccessDenied, ValueError) as exc:
                self._refusal = str(exc)
        if self._refusal:
            self._connection.note_refused(self._refusal)
            self.say(f"dm: error: {self._refusal}")
            self._channel.exit(1)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.session_ended()
        if self._is_served:
            self._is_served = False
            self._connection.served()

    def say(self, line: str) -> None:
        """A line on the client's stderr; a client that is gone does not hear it."""
        try:
            self._channel.write_stderr(line.encode() + b"\n")
        except OSError:
            pass

    def _close_channel(self) -> None:
        self._channel.exit(self.exit_status)
