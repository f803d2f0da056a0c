"""Real SSH on the loopback: our client and server, OpenSSH's client and server, pipes."""

import asyncio
import contextlib
import getpass
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from dmsync.core.names import RemoteUrl, parse_remote_url
from dmsync.engine.access import Access
from dmsync.errors import AccessDenied, ConfigError, HostKeyRejected, NetworkError, NotADmServer
from dmsync.transports.admission import ServerLimits
from dmsync.transports.connecting import connect
from dmsync.transports.ssh_client import fetch_host_key, host_is_known
from dmsync.transports.ssh_library import TRANSPORT_OPTIONS
from dmsync.transports.ssh_server import ServerSettings, serve
from dmsync.transports.ssh_settings import SshSettings
from tests.support.keys import known_hosts_line, make_key
from tests.support.processes import Daemon
from tests.support.sshd import PRIVILEGE_SEPARATION_DIRECTORY, SSHD, free_port, has_sshd
from tests.support.stream_peer import PROGRAM, serve_peer

BULK_BYTES = 256 << 20
DEADLINE_S = 30.0


class Place:
    """Files of one test: keys, known hosts, our server's settings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host_key = make_key(directory / "host_key", "host")
        self.key = make_key(directory / "user_key", "user")
        self.authorized_keys = directory / "authorized_keys"
        self.authorized_keys.write_text(self.key.public + "\n")
        self.known_hosts = directory / "known_hosts"
        self.accepted = directory / "home" / "known_hosts"
        self.limits = ServerLimits(per_source_max=100)

    def server_settings(self, **changes: Any) -> ServerSettings:
        settings = ServerSettings(
            host="127.0.0.1",
            port=0,
            host_key_file=str(self.host_key.private),
            authorized_keys_file=str(self.authorized_keys),
            owner="owner",
            limits=self.limits,
        )
        return replace(settings, **changes)

    def client_settings(self, **changes: Any) -> SshSettings:
        settings = SshSettings(
            accepted_hosts_file=str(self.accepted),
            known_hosts_files=(str(self.known_hosts),),
            key_file=str(self.key.private),
            connect_timeout_s=20,
        )
        return replace(settings, **changes)

    def trust(self, port: int, public: str | None = None) -> None:
        with self.known_hosts.open("a") as file:
            file.write(known_hosts_line(port, public or self.host_key.public))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextlib.asynccontextmanager
async def serving(settings: ServerSettings, handler: Any = serve_peer) -> AsyncIterator[int]:
    """Our server in this process; gives its port."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(settings, handler, lambda host, port: ready.set_result(port), stop=stop)
    )
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    try:
        if not ready.done():
            await task  # it failed to start: raise why
        yield ready.result()
    finally:
        stop.set()
        await task


def url(port: int, user: str = "owner", path: str = "") -> RemoteUrl:
    return parse_remote_url(f"ssh://{user}@127.0.0.1:{port}{path}")


async def ask(stream: Any, request: bytes) -> bytes:
    """Everything that comes back."""
    await stream.write(request)
    await stream.write_eof()
    answer = b""
    while data := await stream.read(65536):
        answer += data
    return answer


async def ask_server(port: int, request: bytes, settings: SshSettings, **where: str) -> bytes:
    async with connect(url(port, **where), settings) as stream:
        return await ask(stream, request)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine with a deadline."""

    async def limited() -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await work

    return asyncio.run(limited())


# --- our client, our server ------------------------------------------------------------------------


def test_every_byte_comes_back(place: Place) -> None:
    payload = os.urandom(3_000_001)

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            answer = await ask_server(port, b"echo\n" + payload, place.client_settings())
            assert answer == payload

    run(work())


def test_handler_learns_who_logged_in_and_what_the_key_may(place: Place) -> None:
    place.authorized_keys.write_text(
        f'dm-user="alice",dm-role="read",dm-dots="x/*" {place.key.public}\n'
    )

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            settings = place.client_settings()
            assert (
                await ask_server(port, b"who\n", settings, user="alice")
                == b"alice 'alice' ['read']"
            )
            with pytest.raises(AccessDenied):
                await ask_server(port, b"who\n", settings, user="bob")

    run(work())


def test_authorized_keys_are_read_again_when_changed(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            settings = place.client_settings()
            assert await ask_server(port, b"echo\nhi", settings) == b"hi"
            other = make_key(place.directory / "other")
            place.authorized_keys.write_text(other.public + "\n")
            with pytest.raises(AccessDenied):
                await ask_server(port, b"echo\nhi", settings)
            settings = replace(settings, key_file=str(other.private))
            assert await ask_server(port, b"echo\nhi", settings) == b"hi"
            place.authorized_keys.unlink()
            with pytest.raises(AccessDenied):
                await ask_server(port, b"echo\nhi", settings)

    run(work())


@pytest.mark.parametrize(
    "options",
    [
        'command="dm"',
        'dm-role="god"',
        "dm-role",
        'dm-dots="a b"',
        'from="10.0.0.0/8"',
        "x,",
        'dm-user=""',
    ],
)
def test_key_with_options_not_understood_is_refused(place: Place, options: str) -> None:
    place.authorized_keys.write_text(f"{options} {place.key.public}\n")

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            with pytest.raises(AccessDenied) as caught:
                await ask_server(port, b"echo\n", place.client_settings())
            assert caught.value.exit_code == 12

    run(work())


def test_certificate_of_a_trusted_authority_is_accepted(place: Place) -> None:
    authority = asyncssh.generate_private_key("ssh-ed25519")
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    user_key = asyncssh.read_private_key(str(place.key.private))
    public = authority.export_public_key().decode()
    place.authorized_keys.write_text(f'cert-authority,dm-role="append" {public}')

    async def attempt(port: int, signer: Any, principals: list[str]) -> bytes:
        certificate = signer.generate_user_certificate(user_key, "id", principals=principals)
        async with asyncssh.connect(
            "127.0.0.1",
            port,
            username="alice",
            client_keys=[(user_key, certificate)],
            agent_path=None,
            known_hosts=None,
            config=None,
        ) as connection:
            done = await connection.run("dm serve --stdio", input=b"who\n", encoding=None)
            assert isinstance(done.stdout, bytes)
            return done.stdout

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            assert await attempt(port, authority, ["alice"]) == b"alice 'alice' []"
            for signer, principals in ((stranger, ["alice"]), (authority, ["bob"])):
                with pytest.raises(asyncssh.PermissionDenied):
                    await attempt(port, signer, principals)
            place.trust(port)
            with pytest.raises(AccessDenied):  # the authority's key signs, the plain key is none
                await ask_server(port, b"who\n", place.client_settings())

    run(work())


def test_path_of_another_store_is_refused(place: Place) -> None:
    async def work() -> None:
        settings = place.server_settings(store_home=str(place.directory))
        async with serving(settings) as port:
            place.trust(port)
            near = place.client_settings()
            assert await ask_server(port, b"echo\nhi", near, path=str(place.directory)) == b"hi"
            with pytest.raises(NotADmServer, match="one store"):
                await ask_server(port, b"echo\nhi", near, path="/elsewhere")

    run(work())


def test_server_makes_its_host_key_once(place: Place) -> None:
    made = place.directory / "keys" / "made"

    async def work() -> None:
        settings = place.server_settings(host_key_file=str(made))
        seen = []
        for _ in range(2):
            async with serving(settings) as port:
                seen.append((await fetch_host_key(url(port), place.client_settings()))[0])
        assert seen[0] == seen[1]
        assert made.stat().st_mode & 0o777 == 0o600
        made.chmod(0o644)
        with pytest.raises(ConfigError, match="read by others"):
            async with serving(settings):
                pass

    run(work())


def test_sessions_finish_after_stop_and_stragglers_are_cut(place: Place) -> None:
    place.limits = replace(place.limits, shutdown_grace_s=0.3)
    ended = []

    async def handler(stream: Any, access: Access) -> None:
        try:
            while data := await stream.read(100):
                await stream.write(data)
        finally:
            ended.append(True)

    async def work() -> None:
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            serve(
                place.server_settings(),
                handler,
                lambda host, port: ready.set_result(port),
                stop=stop,
            )
        )
        port = await ready
        place.trust(port)
        async with connect(url(port), place.client_settings()) as stream:
            await stream.write(b"a")
            assert await stream.read(1) == b"a"
            stop.set()
            began = time.monotonic()
            await task
            assert 0.2 < time.monotonic() - began < 3
            assert ended == [True]
            with pytest.raises(NetworkError):
                while await stream.read(1):
                    pass
                await stream.write(b"b")

    run(work())


def test_a_broken_session_does_not_end_the_server(place: Place) -> None:
    async def handler(stream: Any, access: Access) -> None:
        if (await stream.read(1)) == b"x":
            raise RuntimeError("a bug")
        await stream.write(b"fine")

    async def work() -> None:
        async with serving(place.server_settings(), handler) as port:
            place.trust(port)
            settings = place.client_settings()
            with pytest.raises(NotADmServer):
                await ask_server(port, b"x", settings)
            assert await ask_server(port, b"y", settings) == b"fine"

    run(work())


def test_stalled_connections_are_few_and_end(place: Place) -> None:
    place.limits = ServerLimits(per_source_max=5, login_timeout_s=1.0)

    def stalled(port: int) -> list[socket.socket]:
        return [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]

    async def banner(one: socket.socket) -> bytes:
        reader, writer = await asyncio.open_connection(sock=one)
        data = await reader.read(200)
        one_more = await reader.read()  # until the server ends it
        writer.close()
        return data + one_more

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            began = time.monotonic()
            answers = await asyncio.gather(*(banner(one) for one in stalled(port)))
            assert sum(answer.startswith(b"SSH-2.0-") for answer in answers) == 5
            assert time.monotonic() - began < 10
            assert await ask_server(port, b"echo\nhi", place.client_settings()) == b"hi"

    run(work())


def test_too_many_sessions_on_one_connection_are_refused(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port, raw_client(place, port) as connection:
            open_sessions = [
                await connection.create_process("dm serve --stdio", encoding=None) for _ in range(8)
            ]
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process("dm serve --stdio", encoding=None)
            open_sessions[0].stdin.write_eof()
            await open_sessions[0].wait()
            await connection.create_process("dm serve --stdio", encoding=None)

    run(work())


def raw_client(place: Place, port: int, **options: Any) -> Any:
    """asyncssh as somebody else would use it."""
    return asyncssh.connect(
        "127.0.0.1",
        port,
        **{
            "username": "owner",
            "client_keys": [str(place.key.private)],
            "agent_path": None,
            "known_hosts": None,
            "config": None,
            **options,
        },
    )


def test_only_a_dm_session_can_be_asked_for(place: Place) -> None:
    commands = [
        None,
        "id",
        "dm gc",
        "dm serve --stdio; id",
        "scp -t /",
        "dm serve --stdio --home '",
    ]

    async def work() -> None:
        async with serving(place.server_settings()) as port, raw_client(place, port) as connection:
            for command in commands:
                done = await connection.run(command, input="")
                assert (done.exit_status, done.stdout) == (1, ""), command
                assert "dm" in done.stderr
            with pytest.raises((asyncssh.SFTPError, asyncssh.Error)):
                await connection.start_sftp_client()
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_connection("127.0.0.1", port)
            with pytest.raises(asyncssh.ChannelListenError):
                await connection.forward_remote_port("127.0.0.1", 0, "127.0.0.1", port)
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_unix_connection("/run/x")
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.run("dm serve --stdio", term_type="xterm", request_pty="force")
            done = await connection.run(subsystem="dmsync", input="echo\nhi")
            assert (done.exit_status, done.stdout) == (0, "hi")

    run(work())


@pytest.mark.parametrize(
    "options",
    [
        {"client_keys": [], "password": "x", "preferred_auth": "password"},
        {"client_keys": [], "preferred_auth": "keyboard-interactive"},
        {"client_keys": []},
        {"username": "../etc"},
        {"username": ""},
    ],
)
def test_nothing_but_a_known_key_logs_in(place: Place, options: dict[str, Any]) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            with pytest.raises((asyncssh.PermissionDenied, asyncssh.DisconnectError)):
                async with raw_client(place, port, **options):
                    pass

    run(work())


def test_compression_is_not_negotiated(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            with pytest.raises(asyncssh.KeyExchangeFailed):
                async with raw_client(place, port, compression_algs=["zlib@openssh.com"]):
                    pass

    run(work())


# --- host keys -------------------------------------------------------------------------------------


def test_unknown_host_is_refused_until_its_fingerprint_is_accepted(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            settings = place.client_settings()
            shown, line = await fetch_host_key(url(port), settings)
            assert line + "\n" == known_hosts_line(port, place.host_key.public)
            assert not host_is_known(url(port), settings)
            with pytest.raises(HostKeyRejected) as caught:
                await ask_server(port, b"echo\nhi", settings)
            assert shown in caught.value.message
            assert f"--accept-host-key {shown}" in caught.value.hint
            assert caught.value.exit_code == 12
            with pytest.raises(HostKeyRejected):
                await ask_server(
                    port, b"echo\nhi", replace(settings, accept_host_key="SHA256:" + "A" * 43)
                )
            assert not place.accepted.exists()
            accepting = replace(settings, accept_host_key=shown)
            assert await ask_server(port, b"echo\nhi", accepting) == b"hi"
            assert place.accepted.read_text() == line + "\n"
            assert place.accepted.stat().st_mode & 0o777 == 0o600
            assert await ask_server(port, b"echo\nhi", settings) == b"hi"
            assert host_is_known(url(port), settings)

    run(work())


def test_unknown_host_is_asked_about(place: Place) -> None:
    asked = []

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            for answer in (False, True):

                def ask_user(host: str, shown: str, answer: bool = answer) -> bool:
                    asked.append((host, shown))
                    return answer

                settings = place.client_settings(on_unknown_host=ask_user)
                if answer:
                    assert await ask_server(port, b"echo\nhi", settings) == b"hi"
                else:
                    with pytest.raises(HostKeyRejected):
                        await ask_server(port, b"echo\nhi", settings)
            assert await ask_server(port, b"echo\nhi", settings) == b"hi"

    run(work())
    assert len(asked) == 2
    assert asked[0][0] == "127.0.0.1"
    assert asked[0][1].startswith("SHA256:")


def test_changed_host_key_is_always_refused(place: Place) -> None:
    other = make_key(place.directory / "other_host_key")

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port, other.public)
            settings = place.client_settings()
            shown, _ = await fetch_host_key(url(port), settings)
            old = asyncssh.import_public_key(other.public).get_fingerprint()
            for attempt in (
                settings,
                replace(settings, accept_host_key=shown),
                replace(settings, on_unknown_host=lambda host, shown: True),
            ):
                with pytest.raises(HostKeyRejected, match="CHANGED") as caught:
                    await ask_server(port, b"echo\nhi", attempt)
                assert shown in caught.value.message
                assert old in caught.value.message
            assert not place.accepted.exists()

    run(work())


def test_changed_host_key_of_another_type_is_refused_too(place: Place) -> None:
    other = asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_public_key().decode()

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port, other)
            with pytest.raises(HostKeyRejected, match="CHANGED"):
                await ask_server(port, b"echo\nhi", place.client_settings())

    run(work())


def test_revoked_host_key_is_refused(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            with place.known_hosts.open("a") as file:
                file.write(f"@revoked * {place.host_key.public}\n")
            with pytest.raises(HostKeyRejected, match="revoked"):
                await ask_server(port, b"echo\nhi", place.client_settings())

    run(work())


def test_hashed_entries_are_understood(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            subprocess.run(
                ["ssh-keygen", "-q", "-H", "-f", place.known_hosts], check=True, capture_output=True
            )
            assert "127.0.0.1" not in place.known_hosts.read_text()
            assert await ask_server(port, b"echo\nhi", place.client_settings()) == b"hi"

    run(work())


@pytest.mark.parametrize("kind", ["missing", "empty", "/dev/null", "directory", "garbage"])
def test_no_known_hosts_file_makes_a_host_known(place: Place, kind: str) -> None:
    file = place.known_hosts
    if kind == "empty":
        file.touch()
    elif kind == "directory":
        file.mkdir()
    elif kind == "garbage":
        file.write_bytes(b"\xff\xfe * ssh-ed25519\n|1|x|y ssh-ed25519 AAAA\n* none\nnone\n")
    elif kind == "/dev/null":
        file = Path("/dev/null")

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            settings = place.client_settings(known_hosts_files=(str(file),))
            with pytest.raises((HostKeyRejected, ConfigError)):
                await ask_server(port, b"echo\nhi", settings)

    run(work())


def test_ssh_configuration_cannot_switch_host_checking_off(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place.directory / "user"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "config").write_text(
        "Host *\n UserKnownHostsFile none\n StrictHostKeyChecking no\n ProxyCommand false\n"
    )
    monkeypatch.setenv("HOME", str(home))

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            with pytest.raises(HostKeyRejected, match="not known"):
                await ask_server(port, b"echo\nhi", place.client_settings())
            place.trust(port)
            assert await ask_server(port, b"echo\nhi", place.client_settings()) == b"hi"

    run(work())


def test_host_certificates_need_their_authority(place: Place) -> None:
    authority = asyncssh.generate_private_key("ssh-ed25519")
    host_key = asyncssh.read_private_key(str(place.host_key.private))
    certificate = authority.generate_host_certificate(host_key, "h", principals=["127.0.0.1"])

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return True

    async def echo(process: Any) -> None:
        process.stdout.write(b"hi")
        process.exit(0)

    async def work() -> None:
        listener = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Server,
            server_host_keys=[(host_key, certificate)],
            process_factory=echo,
            encoding=None,
            config=None,
        )
        async with listener:
            port = listener.get_port()
            with pytest.raises(HostKeyRejected, match="not known"):
                await ask_server(port, b"", place.client_settings())
            public = authority.export_public_key().decode().strip()
            place.known_hosts.write_text(f"@cert-authority [127.0.0.1]:{port} {public}\n")
            assert await ask_server(port, b"", place.client_settings()) == b"hi"
            stranger = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
            place.known_hosts.write_text(f"@cert-authority [127.0.0.1]:{port} {stranger}")
            with pytest.raises(HostKeyRejected):
                await ask_server(port, b"", place.client_settings())

    run(work())


# --- failures to connect ---------------------------------------------------------------------------


def test_nothing_listening_is_a_network_error(place: Place) -> None:
    port = free_port()
    with pytest.raises(NetworkError) as caught:
        run(ask_server(port, b"", place.client_settings()))
    assert (caught.value.facts["host"], caught.value.facts["port"]) == ("127.0.0.1", port)
    assert caught.value.exit_code == 13


def test_a_name_that_does_not_resolve_is_a_network_error(place: Place) -> None:
    async def work() -> None:
        async with connect(parse_remote_url("ssh://nowhere.invalid"), place.client_settings()):
            pass

    with pytest.raises(NetworkError):
        run(work())


def test_a_server_that_never_answers_is_given_up(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(NetworkError):
            run(ask_server(port, b"", place.client_settings(connect_timeout_s=0.5)))


def test_something_else_than_ssh_is_told_apart(place: Place) -> None:
    async def answer(reader: Any, writer: Any) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 2000)
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises((NotADmServer, NetworkError)) as caught:
                await ask_server(port, b"", place.client_settings())
            assert caught.value.exit_code == 13

    run(work())


def test_wrong_key_is_access_denied(place: Place) -> None:
    other = make_key(place.directory / "other")

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)
            with pytest.raises(AccessDenied) as caught:
                await ask_server(port, b"", place.client_settings(key_file=str(other.private)))
            assert caught.value.facts["port"] == port

    run(work())


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_unusable_key_file_is_a_configuration_error(place: Place, content: str | None) -> None:
    file = place.directory / "bad_key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="bad_key"):
        run(ask_server(1, b"", place.client_settings(key_file=str(file))))


# --- OpenSSH's client ------------------------------------------------------------------------------


def ssh_command(place: Place, *options: str) -> str:
    return " ".join(
        [
            f"ssh -F none -i {place.key.private} -o IdentitiesOnly=yes -o BatchMode=yes",
            f"-o UserKnownHostsFile={place.known_hosts} -o GlobalKnownHostsFile=none",
            *options,
        ]
    )


def test_openssh_client_reaches_our_server(place: Place) -> None:
    payload = os.urandom(1_000_000)

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            settings = place.client_settings(ssh_command=ssh_command(place))
            with pytest.raises(HostKeyRejected):
                await ask_server(port, b"echo\nhi", settings)
            place.trust(port)
            assert await ask_server(port, b"echo\n" + payload, settings) == payload
            place.authorized_keys.write_text("")
            with pytest.raises(AccessDenied) as caught:
                await ask_server(port, b"echo\nhi", settings)
            assert "Permission denied" in caught.value.message

    run(work())


def test_openssh_client_gets_no_shell_sftp_or_forwarding(place: Place) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            place.trust(port)

            async def ssh(*arguments: str) -> tuple[int, bytes]:
                words = ssh_command(place).split()
                process = await asyncio.create_subprocess_exec(
                    *words,
                    *("-p", str(port)),
                    *arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                _, said = await process.communicate()
                return process.returncode or 0, said

            code, said = await ssh("owner@127.0.0.1")
            assert (code, b"there is no shell" in said) == (1, True)
            code, said = await ssh("owner@127.0.0.1", "id")
            assert (code, b"only 'dm serve --stdio'" in said) == (1, True)
            code, said = await ssh("-s", "owner@127.0.0.1", "sftp")
            assert (code, b"only the subsystem" in said) == (1, True)
            code, said = await ssh("-N", "-W", f"127.0.0.1:{port}", "owner@127.0.0.1")
            assert code == 255
            assert b"prohibited" in said.lower() or b"open failed" in said
            code, said = await ssh(
                *("-o", "ExitOnForwardFailure=yes", "-N", "-R", "0:127.0.0.1:1"), "owner@127.0.0.1"
            )
            assert code == 255

    run(work())


def test_ssh_command_that_cannot_run_is_a_network_error(place: Place) -> None:
    with pytest.raises(NetworkError, match="cannot run"):
        run(ask_server(1, b"", place.client_settings(ssh_command="/no/such/ssh")))


# --- stock sshd ------------------------------------------------------------------------------------


class Sshd:
    """OpenSSH's server for the current user, with keys of this test."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.port = free_port()
        self.user = getpass.getuser()
        if not PRIVILEGE_SEPARATION_DIRECTORY.exists():
            PRIVILEGE_SEPARATION_DIRECTORY.mkdir(mode=0o755)
        config = place.directory / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {place.host_key.private}\n"
            f"AuthorizedKeysFile {place.authorized_keys}\nPidFile none\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        )
        self.daemon = Daemon([SSHD, "-D", "-e", "-f", config], log=place.directory / "sshd.log")
        self.daemon.wait_for("Server listening")
        place.trust(self.port)


@pytest.fixture
def sshd(place: Place) -> Iterator[Sshd]:
    if not has_sshd():
        pytest.skip("sshd is not installed")
    server = Sshd(place)
    yield server
    server.daemon.kill()


@pytest.mark.parametrize("client", ["built-in", "command"])
@pytest.mark.parametrize("way", ["exec", "forced command"])
def test_stock_sshd_carries_every_byte(sshd: Sshd, way: str, client: str) -> None:
    place = sshd.place
    payload = os.urandom(3_000_001)
    settings = place.client_settings(dm_command=PROGRAM)
    if way == "forced command":
        place.authorized_keys.write_text(f'restrict,command="{PROGRAM}" {place.key.public}\n')
        settings = replace(settings, dm_command=None)
    if client == "command":
        settings = replace(settings, ssh_command=ssh_command(place))
    answer = run(ask_server(sshd.port, b"echo\n" + payload, settings, user=sshd.user))
    assert answer == payload


def test_printing_over_there_does_not_harm_the_stream(sshd: Sshd) -> None:
    settings = sshd.place.client_settings(dm_command=PROGRAM)

    async def work() -> None:
        async with connect(url(sshd.port, sshd.user), settings) as stream:
            assert await ask(stream, b"print\n") == b"done"
            assert stream.diagnostics() == "a stray line"

    run(work())


def test_what_a_server_that_is_no_dm_says_is_kept(sshd: Sshd) -> None:
    settings = sshd.place.client_settings(dm_command=PROGRAM)

    async def work() -> None:
        async with connect(url(sshd.port, sshd.user), settings) as stream:
            assert await ask(stream, b"banner\n") == b"220 example ESMTP\r\n"
            assert "EXAMPLE" in stream.diagnostics()
            assert "\x1b" not in stream.diagnostics()

    run(work())


@pytest.mark.parametrize("client", ["built-in", "command"])
def test_missing_dm_over_there_is_named(sshd: Sshd, client: str) -> None:
    settings = sshd.place.client_settings(dm_command="/no/such/dm")
    if client == "command":
        settings = replace(settings, ssh_command=ssh_command(sshd.place))
    with pytest.raises(NotADmServer, match="cannot run dm") as caught:
        run(ask_server(sshd.port, b"echo\n", settings, user=sshd.user))
    assert "--dm-command" in caught.value.hint
    assert caught.value.facts["exit_status"] == 127


@pytest.mark.parametrize("client", ["built-in", "command"])
def test_wrong_user_key_at_stock_sshd_is_access_denied(sshd: Sshd, client: str) -> None:
    sshd.place.authorized_keys.write_text("")
    settings = sshd.place.client_settings()
    if client == "command":
        settings = replace(settings, ssh_command=ssh_command(sshd.place))
    with pytest.raises(AccessDenied):
        run(ask_server(sshd.port, b"echo\n", settings, user=sshd.user))


def test_closing_through_stock_sshd_is_prompt(sshd: Sshd) -> None:
    settings = sshd.place.client_settings(dm_command=PROGRAM)

    async def work() -> float:
        async with connect(url(sshd.port, sshd.user), settings) as stream:
            await stream.write(b"echo\nhi")
            assert await stream.read(2) == b"hi"
            began = time.monotonic()
        return time.monotonic() - began

    assert run(work()) < 2


# --- pipes -----------------------------------------------------------------------------------------


def test_local_remote_is_served_by_a_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(place.directory / "python"))
    program = place.directory / "python"
    peer = PROGRAM.split()[1]
    program.write_text(f'#!/bin/sh\necho "$@" >&2\nexec {PROGRAM.split()[0]} {peer}\n')
    program.chmod(0o755)

    async def work() -> None:
        async with connect(
            parse_remote_url(f"{place.directory}/store"), place.client_settings()
        ) as stream:
            assert await ask(stream, b"echo\nhi") == b"hi"
            assert stream.diagnostics() == (
                f"-P -m dmsync serve --stdio --home {place.directory}/store"
            )

    run(work())


# --- throughput (printed, not asserted) ------------------------------------------------------------


async def _measure(port: int, settings: SshSettings, user: str) -> tuple[float, float]:
    part = bytes(range(256)) * 1024
    async with connect(url(port, user), settings) as stream:
        began = time.monotonic()
        await stream.write(b"take\n")
        for _ in range(BULK_BYTES // len(part)):
            await stream.write(part)
        await stream.write_eof()
        assert int(await stream.read(100)) == BULK_BYTES
        up = BULK_BYTES / 1e6 / (time.monotonic() - began)
    async with connect(url(port, user), settings) as stream:
        began = time.monotonic()
        await stream.write(b"give %d\n" % BULK_BYTES)
        received = 0
        while data := await stream.read(1 << 18):
            received += len(data)
        assert received == BULK_BYTES
        down = BULK_BYTES / 1e6 / (time.monotonic() - began)
    return up, down


_SERVER = """
import asyncio, sys
from dmsync.transports.ssh_server import ServerSettings, serve
from tests.support.stream_peer import serve_peer
settings = ServerSettings("127.0.0.1", 0, sys.argv[1], sys.argv[2], "owner")
asyncio.run(serve(settings, serve_peer, lambda h, p: print("port", p, flush=True)))
"""


@pytest.mark.slow
def test_bulk_rates_are_printed(sshd: Sshd, capsys: pytest.CaptureFixture[str]) -> None:
    place = sshd.place
    root = Path(__file__).resolve().parents[2]
    keys = (str(place.host_key.private), str(place.authorized_keys))
    arguments = [sys.executable, "-c", _SERVER, *keys]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    own = Daemon(arguments, log=place.directory / "own.log", environment=environment)
    rates = {}
    with own:
        port = int(own.wait_for(r"port (\d+)")[1])
        place.trust(port)
        near = place.client_settings()
        far = place.client_settings(dm_command=PROGRAM)
        command = ssh_command(place, "-c aes128-gcm@openssh.com")
        rates["own -> own"] = run(_measure(port, near, "owner"))
        rates["own -> sshd"] = run(_measure(sshd.port, far, sshd.user))
        rates["ssh -> own"] = run(_measure(port, replace(near, ssh_command=command), "owner"))
        assert own.terminate() == 0
    with capsys.disabled():
        for name, (up, down) in rates.items():
            print(f"\n{name}: up {up:.0f} MB/s, down {down:.0f} MB/s", end="")


def test_options_of_both_ends_are_explicit() -> None:
    assert TRANSPORT_OPTIONS["config"] is None
    assert TRANSPORT_OPTIONS["compression_algs"] == ["none"]
