"""What our SSH server and client say and refuse below the sessions: packets before the login,
algorithms, requests of a channel."""

import asyncio
import contextlib
import os
import resource
import struct
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from dmsync.errors import DmError
from dmsync.transports.connecting import connect
from tests.e2e.test_transports import Place, ask, place, raw_client, run, serving, url

assert place, "the fixture"

KEXINIT, IGNORE = 20, 2


def packet(payload: bytes) -> bytes:
    """A packet before keys are agreed upon."""
    padding = 8 - (len(payload) + 5) % 8 + 8
    return struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)


async def greeted(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """A raw connection and the server's KEXINIT."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"SSH-2.0-test\r\n")
    assert (await reader.readline()).startswith(b"SSH-2.0-")
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    body = await reader.readexactly(length)
    return reader, writer, body[1 : length - body[0]]


def name_lists(kexinit: bytes) -> list[list[str]]:
    lists, at = [], 17
    for _ in range(10):
        (length,) = struct.unpack_from(">I", kexinit, at)
        lists.append(kexinit[at + 4 : at + 4 + length].decode().split(","))
        at += 4 + length
    return lists


def test_the_server_offers_strict_key_exchange_modern_ciphers_and_no_compression(
    place: Place,
) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            _, writer, kexinit = await greeted(port)
            writer.close()
            assert kexinit[0] == KEXINIT
            kex, _keys, up, down, _, _, squeezed_up, squeezed_down, *_ = name_lists(kexinit)
            assert "kex-strict-s-v00@openssh.com" in kex
            assert not any("sha1" in name for name in kex)
            assert (
                up
                == down
                == [
                    "aes128-gcm@openssh.com",
                    "aes256-gcm@openssh.com",
                    "chacha20-poly1305@openssh.com",
                ]
            )
            assert squeezed_up == squeezed_down == ["none"]

    run(work())


def test_packets_slipped_into_the_key_exchange_end_it(place: Place) -> None:
    """What Terrapin does: a packet nobody sees, so that later ones may be cut off."""

    async def work() -> None:
        async with serving(place.server_settings()) as port:
            reader, writer, kexinit = await greeted(port)
            lists = name_lists(kexinit)
            lists[0] = ["curve25519-sha256", "kex-strict-c-v00@openssh.com"]
            ours = bytes((KEXINIT,)) + bytes(16)
            for names in lists:
                text = ",".join(names).encode()
                ours += struct.pack(">I", len(text)) + text
            writer.write(packet(ours + bytes(5)) + packet(bytes((IGNORE,)) + struct.pack(">I", 0)))
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)  # to the end
            writer.close()

    run(work())


@pytest.mark.parametrize(
    "said",
    [b"x" * 65_536, struct.pack(">IB", 0xFFFF_FFF0, 8), struct.pack(">IB", 300_000, 8)],
    ids=["a line without end", "a packet of 4 GiB", "a packet of 300 kB"],
)
def test_who_has_not_logged_in_makes_the_server_hold_little(place: Place, said: bytes) -> None:
    async def work() -> None:
        async with serving(place.server_settings()) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            if said[:1] != b"x":
                writer.write(b"SSH-2.0-test\r\n")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            sent = 0
            with contextlib.suppress(ConnectionError):
                writer.write(said)
                while sent < 96 << 20:
                    writer.write(b"x" * 65_536)
                    sent += 65_536
                    await asyncio.wait_for(writer.drain(), 5)
            grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert sent < 32 << 20, "it was read on"
            assert grown_kib < 40 << 10
            writer.close()

    run(work())


def test_our_client_takes_no_compression(place: Place) -> None:
    async def work() -> None:
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[str(place.host_key.private)],
            compression_algs=["zlib@openssh.com", "zlib"],
        )
        port = server.get_port()
        place.trust(port)
        with pytest.raises(DmError):
            async with connect(url(port), place.client_settings()) as stream:
                await ask(stream, b"echo\nhi")
        server.close()

    run(work())


def test_environments_are_refused_and_forwarding_is_not_used(place: Place) -> None:
    """asyncssh would keep every variable that a client names, of any size."""

    async def work() -> None:
        async with serving(place.server_settings()) as port, raw_client(place, port) as connection:
            channel, _ = await connection.create_session(
                asyncssh.SSHClientSession,
                "dm serve --stdio",
                env={"LD_PRELOAD": "x", "DM_HOME": "/etc"},
                encoding=None,
            )
            assert "x" not in os.environ.get("LD_PRELOAD", "")
            assert os.environ.get("DM_HOME") != "/etc"
            channel.close()

    seen: list[Any] = []

    async def handler(stream: Any, access: Any) -> None:
        seen.append(dict(stream._channel.get_environment_bytes()))
        await stream.aclose()

    async def asked() -> None:
        async with serving(place.server_settings(), handler) as port:
            async with raw_client(place, port, agent_forwarding=True) as connection:
                process = await connection.create_process(
                    "dm serve --stdio", env={"A": "b"}, encoding=None
                )
                await process.wait()
                assert seen == [{}]

    run(work())
    run(asked())


def test_keepalives_end_a_dead_peer_within_a_minute() -> None:
    from dmsync.transports.ssh_library import TRANSPORT_OPTIONS
    from dmsync.wire.limits import IDLE_TIMEOUT_S

    interval_s = TRANSPORT_OPTIONS["keepalive_interval"]
    assert interval_s * (TRANSPORT_OPTIONS["keepalive_count_max"] + 1) <= IDLE_TIMEOUT_S


def test_old_asyncssh_is_refused(tmp_path: Path) -> None:
    from dmsync.errors import ConfigError
    from dmsync.transports.ssh_library import _check_version

    _check_version("2.24.1")
    for version in ("2.24.0", "2.14.2", "1.99.9"):
        with pytest.raises(ConfigError):
            _check_version(version)
