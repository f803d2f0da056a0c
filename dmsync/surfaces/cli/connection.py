"""Joins the command line, the use cases of synchronising and the transports: who is talked to,
over what, and what happens to working trees meanwhile."""

import os
import re
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from dmsync.errors import HostKeyRejected, NetworkError
from dmsync.surfaces.cli.interrupts import Result, run_async
from dmsync.surfaces.cli.invocation import Invocation
from dmsync.surfaces.cli.output import escape_name

if TYPE_CHECKING:
    from dmsync.core.names import RemoteUrl
    from dmsync.engine.access import Access
    from dmsync.engine.ports import ByteStream
    from dmsync.engine.progress import Progress
    from dmsync.engine.repairing.from_remote import Asked
    from dmsync.engine.store import Store
    from dmsync.engine.sync_pull import FetchRequest, FetchSummary
    from dmsync.engine.sync_push import PushRequest, PushSummary
    from dmsync.storage.catalog import DotRow
    from dmsync.transports.ssh_settings import SshSettings
    from dmsync.wire.messages import Hello, ShareAction


_DOING: Final = {"fetch": "fetching", "pull": "pulling", "clone": "cloning"}


@dataclass(frozen=True)
class Remote:
    """A remote as this run reaches it: the store's record under the configuration's.

    `unrecorded`: (URL, dm command) to record once a dm server has answered there.
    """

    name: str
    url: "RemoteUrl"
    dm_command: str | None
    unrecorded: tuple[str, str | None] | None = None


def find_remote(invocation: Invocation, store: "Store", text: str) -> Remote:
    """The remote that `text` names; a URL becomes a remote of its own, named after its host.

    Tracking branches and upstreams hang on a remote's name, so an address used once needs one.
    It is recorded only when a dm server has answered: a typo leaves nothing behind.

    Raises:
        RemoteNotFound: neither a remote nor a URL.
    """
    from dmsync.core.names import parse_remote_url
    from dmsync.engine.remotes import list_remotes
    from dmsync.errors import RemoteNotFound
    from dmsync.surfaces.cli.remote import absolute_url

    config = invocation.settings.remotes.get(text)
    row = store.catalog.remote(text)
    if row is None and config is not None and config.url:
        url = absolute_url(config.url)
        unrecorded = (url, config.dm_command)
        return Remote(text, parse_remote_url(url), config.dm_command, unrecorded)
    if row is None:
        if not _is_address(text):
            raise RemoteNotFound(
                f"Unable to find remote '{text}'",
                hint="Use 'dm remote -v' to list remotes, 'dm remote add' to add one.",
            )
        url = absolute_url(text)
        known = list_remotes(store)
        row = next((remote for remote in known if remote.url == url), None)
        if row is None:
            taken = {remote.name for remote in known} | set(invocation.settings.remotes)
            return Remote(_name_for(url, taken), parse_remote_url(url), None, (url, None))
        config = invocation.settings.remotes.get(row.name)
    return Remote(
        row.name,
        parse_remote_url((config and config.url) or row.url),
        (config and config.dm_command) or row.dm_command,
    )


def remember(invocation: Invocation, store: "Store", there: Remote) -> None:
    """Record a remote that was found by its address or in the configuration, if it is new."""
    from dmsync.engine.remotes import add_remote
    from dmsync.errors import AlreadyExists

    if there.unrecorded is None or invocation.dry_run:
        return
    known = store.catalog.remote(there.name)
    if known is None:
        try:
            add_remote(store, there.name, *there.unrecorded)
        except AlreadyExists:  # another run of dm was quicker: it must have meant the same
            known = store.catalog.remote(there.name)
        else:
            invocation.talk(f"{there.unrecorded[0]} is now known as remote {there.name}")
            return
    if known is not None and known.url != there.unrecorded[0]:
        raise AlreadyExists(
            f"Remote exists '{there.name}'", hint="run this again, it will get another name"
        )


def _is_address(text: str) -> bool:
    """More than a bare word: a bare host must be added as a remote first, so that a typo in a
    remote's name is not looked up in the DNS."""
    return any(mark in text for mark in "/@:.~")


def _name_for(url: str, taken: set[str]) -> str:
    """A remote's name from its URL: the host, or the last part of a path."""
    from dmsync.core.names import parse_remote_url

    parsed = parse_remote_url(url)
    base = parsed.host or (parsed.path or "").rstrip("/").rpartition("/")[2]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", base).strip("-")[:48] or "remote"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def push(
    invocation: Invocation, store: "Store", there: Remote, request: "PushRequest"
) -> "PushSummary":
    """Push over a new connection, with progress on stderr."""
    from dmsync.engine import sync_push

    with invocation.progress("pushing") as progress:
        return _conversation(
            invocation,
            store,
            there,
            lambda stream: sync_push.push(
                store, stream, request, progress, partial(_greeted, invocation, store, there)
            ),
        )


def fetch(
    invocation: Invocation, store: "Store", there: Remote, request: "FetchRequest"
) -> "FetchSummary":
    """Fetch, pull or clone over a new connection, with progress on stderr."""
    from dmsync.engine import sync_pull
    from dmsync.engine.target_tree import TARGET_TREE

    with invocation.progress(_DOING.get(request.command, request.command)) as progress:
        return _conversation(
            invocation,
            store,
            there,
            lambda stream: sync_pull.fetch(
                store,
                stream,
                request,
                TARGET_TREE,
                progress,
                partial(_greeted, invocation, store, there),
            ),
        )


def bring_objects(
    invocation: Invocation,
    store: "Store",
    there: Remote,
    dot: "DotRow",
    asked: "Asked",
    progress: "Progress",
) -> int:
    """Fetch what a repair misses of a dot; returns how many records came."""
    from dmsync.engine.repairing.from_remote import bring

    upstream = store.catalog.upstream(dot.dot, there.name)
    names = (None, None) if upstream is None else (upstream[0] or None, upstream[1])
    return _conversation(
        invocation,
        store,
        there,
        lambda stream: bring(
            store,
            stream,
            dot,
            names,
            asked,
            progress,
            partial(_greeted, invocation, store, there),
        ),
    )


def share(
    invocation: Invocation,
    store: "Store",
    remote: str,
    dot: tuple[str | None, str],
    action: "ShareAction",
    user: str | None,
) -> tuple[str, list[str]]:
    """List or change the collaborators of a dot over there: (its full name, who they are)."""
    from dmsync.engine import sync_sharing

    there = find_remote(invocation, store, remote)
    return _conversation(
        invocation,
        store,
        there,
        lambda stream: sync_sharing.share(
            store, stream, dot, action, user, partial(_greeted, invocation, store, there)
        ),
    )


def _greeted(invocation: Invocation, store: "Store", there: Remote, peer: "Hello") -> None:
    """A dm server has answered: does it take us for whom we are, and is its address new?

    Raises:
        AccessDenied: it logged us in as somebody else than the URL says.
    """
    from dmsync.engine.sync_opening import LOGIN
    from dmsync.errors import AccessDenied
    from dmsync.wire.failures import printable

    login = dict(peer.capabilities).get(LOGIN)
    if invocation.verbose:
        who = f", which takes us for {printable(login)}" if login else ""
        invocation.talk(f"{there.name} runs {printable(peer.agent)}{who}")
    if login is not None and there.url.user is not None and login != there.url.user:
        raise AccessDenied(
            f"{there.name} logged us in as {printable(login)}, not as {there.url.user}",
            hint="nothing was sent or fetched; somebody may have taken over the connection",
            login=login,
            user=there.url.user,
        )
    remember(invocation, store, there)


def _conversation(
    invocation: Invocation,
    store: "Store",
    there: Remote,
    talk: Callable[["ByteStream"], Coroutine[Any, Any, Result]],
) -> Result:
    """Connect, talk, and say what ssh or the other side said, should that fail."""

    async def converse() -> Result:
        from dmsync.transports.connecting import connect

        async with connect(there.url, ssh_settings(invocation, there.dm_command)) as stream:
            return await talk(stream)

    return run_async(converse())


def ssh_settings(invocation: Invocation, dm_command: str | None = None) -> "SshSettings":
    """How this run reaches and trusts hosts. An unknown key is asked about on a terminal only."""
    from dmsync.transports.ssh_settings import ACCEPTED_HOSTS_FILE, SshSettings, known_hosts_files

    settings = invocation.settings
    return SshSettings(
        accepted_hosts_file=os.path.join(settings.home, ACCEPTED_HOSTS_FILE),
        known_hosts_files=known_hosts_files(settings.known_hosts, settings.user_home),
        key_file=settings.ssh_key,
        ssh_command=settings.ssh_command,
        dm_command=dm_command,
        accept_host_key=invocation.accept_host_key,
        limit_bytes_per_s=invocation.limit_rate,
        on_unknown_host=partial(_ask_about_host, invocation) if _has_terminal() else None,
    )


def _has_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _ask_about_host(invocation: Invocation, host: str, fingerprint: str) -> bool:
    """--yes does not answer this one: who the other side is decides where the data goes."""
    return invocation.ask(
        f"The host key of {escape_name(host)} is not known: {fingerprint}\n"
        "Compare it with the server's own. Trust it? (enter Y to continue): "
    )


def trust_host(invocation: Invocation, url_text: str) -> None:
    """Have the key of a new remote's host known before the remote is: shown, compared, kept.

    A host that cannot be reached now is added all the same; its key is asked about when it can.

    Raises:
        HostKeyRejected: unknown and nobody to ask, refused, not the one given, or changed.
    """
    from dmsync.core.names import parse_remote_url

    url = parse_remote_url(url_text)
    settings = ssh_settings(invocation)
    if url.kind != "ssh" or settings.ssh_command is not None:
        return  # a directory has no key; with an own ssh command known hosts are its affair
    from dmsync.transports.host_keys import remember_host
    from dmsync.transports.ssh_client import fetch_host_key, host_is_known
    from dmsync.transports.ssh_library import asyncssh

    if host_is_known(url, settings):
        return
    try:
        fingerprint, line = run_async(fetch_host_key(url, settings))
    except NetworkError as unreachable:
        if settings.accept_host_key is not None:
            raise
        invocation.warn(f"{unreachable.message}; added without having seen its host key")
        return
    asked = settings.on_unknown_host
    if settings.accept_host_key != fingerprint and not (asked and asked(url.host, fingerprint)):
        raise HostKeyRejected(
            f"the host key of {url.host} is not known: {fingerprint}",
            hint=f"compare it with the server's own, then: --accept-host-key {fingerprint}",
            host=url.host,
            fingerprint=fingerprint,
        )
    key = asyncssh.import_public_key(line.split(" ", 1)[1])
    remember_host(settings.accepted_hosts_file, url.host, url.port, key)
    invocation.talk(f"host key of {url.host}: {fingerprint}")


def server_version(invocation: Invocation, remote: str) -> str:
    """The version of the dm that answers at `remote`."""
    from dmsync.engine.session import Session
    from dmsync.engine.sync_opening import hello
    from dmsync.wire.connection import Role
    from dmsync.wire.messages import Hello, ListDots

    with invocation.open_store() as store:
        there = find_remote(invocation, store, remote)

        async def ask(stream: "ByteStream") -> str:
            async with Session(stream, Role.CLIENT) as session:
                await session.send(hello(store), ListDots())
                return (await session.expect(Hello)).agent

        agent: str = _conversation(invocation, store, there, ask)
    return agent.removeprefix("dmsync/")


# --- serving -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StdioRights:
    """What a forced command says of the key it stands at; all None: its account's own rights."""

    user: str | None = None
    role: str | None = None
    dots: str | None = None

    @property
    def is_given(self) -> bool:
        return (self.user, self.role, self.dots) != (None, None, None)


def serve_stdio(invocation: Invocation, rights: StdioRights) -> None:
    """One session on stdin and stdout, with the rights of the user that runs it, or fewer.

    A store named by --home (a remote's path) must exist: a backup disk that is not mounted must
    not become a store on the disk below it.
    """
    from dmsync.engine.sync_server import serve
    from dmsync.engine.target_tree import TARGET_TREE
    from dmsync.surfaces.cli.server_log import log_refusals
    from dmsync.transports.stdio import take_stdio

    log_refusals()
    with invocation.open_store(create=not invocation.settings.home_given, holding="never") as store:
        access = _stdio_access(invocation, store, rights)

        async def session() -> None:
            await serve(store, take_stdio(), access, TARGET_TREE)

        run_async(session())


def _stdio_access(invocation: Invocation, store: "Store", rights: StdioRights) -> "Access":
    """Raises AccessDenied: sshd's client asked for something else than a session of dm here."""
    from dataclasses import replace

    from dmsync.engine.access import ROLES, access_for, full_access
    from dmsync.engine.refusals import note
    from dmsync.errors import AccessDenied
    from dmsync.surfaces.settings import user_name

    owner = user_name()
    access = full_access(owner)
    if rights.is_given:
        dots = None if rights.dots is None else [dot.strip() for dot in rights.dots.split(",")]
        access = access_for(
            rights.user or owner,
            ROLES[rights.role or "write"],
            dots,
            owner=owner,
            is_collaborator=store.catalog.is_collaborator,
        )
    session = invocation.settings.ssh_session
    if session is None:
        return access
    access = replace(
        access, fingerprint=_key_of_session(session.auth_info_file), address=session.address
    )
    if session.original_command is None:
        return access
    try:
        return _narrowed(access, store.home, session.original_command)
    except AccessDenied as exc:
        note("refused", who=access.actor, source=access.address, verb="session", why=exc.message)
        raise


def _narrowed(access: "Access", home: str, command: str) -> "Access":
    """For `dm serve --stdio [--home HERE]`: as it is; for a dot's name: that dot alone.

    Raises:
        AccessDenied: anything else, and another store's path.
    """
    from dataclasses import replace

    from dmsync.engine.access import parse_dot_pattern
    from dmsync.errors import AccessDenied
    from dmsync.transports.remote_command import requested_dot, requested_home

    dot = requested_dot(command)
    if dot is not None:
        return replace(access, only=parse_dot_pattern(dot, access.default_namespace))
    asked = requested_home(command)
    if asked is not None and os.path.realpath(asked) != os.path.realpath(home):
        raise AccessDenied("this key is for one store, and not the one in the URL's path")
    return access


def _key_of_session(auth_info_file: str | None) -> str:
    """Fingerprint of the key that sshd let in, if it says so; empty if not."""
    import base64
    import binascii
    import hashlib

    if auth_info_file is None:
        return ""
    try:
        with open(auth_info_file, encoding="ascii", errors="replace") as file:
            words = file.read(64 * 1024).split()
        if words[0] != "publickey":
            return ""
        digest = hashlib.sha256(base64.b64decode(words[2], validate=True)).digest()
    except (OSError, IndexError, binascii.Error):
        return ""
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def serve_listening(
    invocation: Invocation,
    host: str,
    port: int,
    host_key: str,
    authorized_keys: str,
    on_ready: Callable[[str, int], None],
) -> None:
    """Be an SSH server until SIGTERM or Ctrl-C; both end it in good order."""
    import asyncio

    from dmsync.engine.access import Access
    from dmsync.engine.quotas import drop_abandoned
    from dmsync.engine.sync_server import serve as serve_session
    from dmsync.engine.target_tree import TARGET_TREE
    from dmsync.surfaces.cli.server_log import log_refusals
    from dmsync.surfaces.settings import user_name
    from dmsync.transports.ssh_server import ServerSettings, serve

    log_refusals()
    with invocation.open_store(create=True, holding="never") as store:
        drop_abandoned(store)
        settings = ServerSettings(
            host=host,
            port=port,
            host_key_file=host_key,
            authorized_keys_file=authorized_keys,
            owner=user_name(),
            store_home=store.home,
            is_collaborator=store.catalog.is_collaborator,
        )

        async def handle(stream: "ByteStream", access: Access) -> None:
            await serve_session(store, stream, access, TARGET_TREE)

        # The server itself stops on signals; it must not be cancelled by them as well.
        asyncio.run(serve(settings, handle, on_ready))
