"""What our SSH server bounds for users who are logged in, and host keys of an own ssh command."""

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from dmsync.errors import HostKeyRejected
from dmsync.transports.connecting import connect
from tests.e2e.test_transports import Place, ask, raw_client, run, serving, url
from tests.support.cluster import has_command
from tests.support.keys import known_hosts_line, make_key


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_one_user_leaves_room_for_others(place: Place) -> None:
    other = make_key(place.directory / "other")
    place.authorized_keys.write_text(
        f'dm-user="alice" {place.key.public}\ndm-user="bob" {other.public}\n'
    )
    place.limits = replace(place.limits, connections_per_user_max=2)

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            first = await raw_client(place, port, username="alice")
            second = await raw_client(place, port, username="alice")
            third = None
            with pytest.raises((asyncssh.Error, OSError)):
                third = await raw_client(place, port, username="alice")
                await third.run("dm serve --stdio", input="")
            keys = {"client_keys": [str(other.private)], "username": "bob"}
            async with raw_client(place, port, **keys) as of_bob:
                assert (await of_bob.run("dm serve --stdio", input="echo\nhi")).stdout == "hi"
            first.close()
            await first.wait_closed()
            await asyncio.sleep(0.1)
            async with raw_client(place, port, username="alice") as again:
                assert (await again.run("dm serve --stdio", input="echo\nhi")).stdout == "hi"
            second.close()

    run(work())


def test_a_connection_without_a_session_is_closed_and_a_busy_one_is_not(place: Place) -> None:
    place.limits = replace(place.limits, login_timeout_s=1.0)

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            busy = await raw_client(place, port)
            session = await busy.create_process("dm serve --stdio", encoding=None)
            idle = await raw_client(place, port)
            began = time.monotonic()
            await idle.wait_closed()
            assert time.monotonic() - began < 15
            session.stdin.write(b"echo\nstill here")
            session.stdin.write_eof()
            assert await session.stdout.read() == b"still here"
            busy.close()

    run(work())


def test_refused_logins_and_requests_are_told(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_key(place.directory / "stranger")
    logging.getLogger("dmsync.audit").propagate = True

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            with pytest.raises(asyncssh.PermissionDenied):
                await raw_client(place, port, client_keys=[str(stranger.private)])
            async with raw_client(place, port) as connection:
                await connection.run("rm -rf /", input="")
            await asyncio.sleep(0.05)

    with caplog.at_level(logging.WARNING, "dmsync.audit"):
        run(work())
    fingerprint = asyncssh.read_public_key(f"{stranger.private}.pub").get_fingerprint()
    said = [record.getMessage() for record in caplog.records]
    assert any(f"user=owner key={fingerprint} from=127.0.0.1 verb=login" in s for s in said), said
    assert any("verb=session" in s and "not a shell" in s for s in said), said


def test_a_user_name_with_a_space_forges_no_key_in_the_log(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_key(place.directory / "stranger")
    logging.getLogger("dmsync.audit").propagate = True

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            with pytest.raises(asyncssh.PermissionDenied):
                keys = [str(stranger.private)]
                await raw_client(place, port, client_keys=keys, username="alice SHA256:FORGED")
            await asyncio.sleep(0.05)

    with caplog.at_level(logging.WARNING, "dmsync.audit"):
        run(work())
    fingerprint = asyncssh.read_public_key(f"{stranger.private}.pub").get_fingerprint()
    said = [record.getMessage() for record in caplog.records]
    assert any(f'user="alice SHA256:FORGED" key={fingerprint} from=' in s for s in said), said


def test_a_key_that_is_taken_out_of_the_file_may_nothing_more_in_an_open_session(
    place: Place,
) -> None:
    line = f'dm-user="alice",dm-role="write" {place.key.public}\n'
    place.authorized_keys.write_text(f"# before\n{line}")
    seen: list[bool] = []

    async def handler(stream: Any, access: Any) -> None:
        while await stream.read(1):
            seen.append(access.may("alice", "apples", "append"))
            await stream.write(b".")

    async def work() -> None:
        async with serving(place.server_settings(), handler) as port:
            async with raw_client(place, port, username="alice") as connection:
                session = await connection.create_process("dm serve --stdio", encoding=None)

                async def asked() -> bool:
                    session.stdin.write(b"?")
                    await session.stdout.readexactly(1)
                    return seen[-1]

                assert await asked()
                place.authorized_keys.write_text(f"# the same, elsewhere in the file\n\n{line}")
                assert await asked()
                place.authorized_keys.write_text(line.replace("write", "append"))
                assert not await asked(), "what the key may is asked for again by a new session"
                place.authorized_keys.write_text("# nobody\n")
                assert not await asked()
                refused = await connection.run("dm serve --stdio")
                assert refused.exit_status == 1 and "not authorized any more" in refused.stderr
                session.stdin.write_eof()

    run(work())


@pytest.mark.parametrize("kind", ["unknown", "changed", "revoked", "known", "hashed", "authority"])
def test_with_an_own_ssh_command_its_host_keys_decide(place: Place, kind: str) -> None:
    if not has_command("ssh"):
        pytest.skip("no ssh here")
    other = make_key(place.directory / "another")

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            good = known_hosts_line(port, place.host_key.public)
            place.known_hosts.write_text(
                {
                    "unknown": "",
                    "changed": known_hosts_line(port, other.public),
                    "revoked": good + f"@revoked * {place.host_key.public}\n",
                    "known": good,
                    "hashed": good,
                    "authority": f"@cert-authority * {place.host_key.public}\n",
                }[kind]
            )
            if kind == "hashed":
                await _hash(place.known_hosts)
            command = (
                f"ssh -F none -o BatchMode=yes -o UserKnownHostsFile={place.known_hosts} "
                f"-o GlobalKnownHostsFile=none -i {place.key.private}"
            )
            settings = place.client_settings(ssh_command=command)
            if kind in ("known", "hashed"):
                assert await _echo(port, settings) == b"hi"
                return
            with pytest.raises(HostKeyRejected) as caught:
                await _echo(port, settings)
            assert caught.value.exit_code == 12

    run(work())


async def _echo(port: int, settings: Any) -> bytes:
    async with connect(url(port), settings) as stream:
        return await ask(stream, b"echo\nhi")


async def _hash(known_hosts: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        "ssh-keygen",
        "-H",
        "-f",
        str(known_hosts),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
