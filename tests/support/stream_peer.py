"""The far end of a byte stream for tests of transports: does what the first line asks.

`echo` sends everything back; `take` counts until the end and says how much it was; `give N` sends
N bytes; `banner` talks like something that is no dm; `print` writes to stdout behind the stream.
Run as a program it serves its own stdin and stdout, as `dm serve --stdio` does.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PART = bytes(range(256)) * 1024


async def serve_peer(stream: Any, access: Any = None) -> None:
    """Serve one stream to its end."""
    received = b""
    while b"\n" not in received:
        data = await stream.read(65536)
        if not data:
            return
        received += data
    line, _, rest = received.partition(b"\n")
    word, _, argument = line.decode().partition(" ")
    await _WORDS[word](stream, rest, argument, access)


async def _echo(stream: Any, rest: bytes, argument: str, access: Any) -> None:
    while rest:
        await stream.write(rest)
        rest = await stream.read(1 << 18)
    await stream.write_eof()


async def _take(stream: Any, rest: bytes, argument: str, access: Any) -> None:
    taken = len(rest)
    while data := await stream.read(1 << 18):
        taken += len(data)
    await stream.write(b"%d\n" % taken)


async def _give(stream: Any, rest: bytes, argument: str, access: Any) -> None:
    left = int(argument)
    while left:
        await stream.write(PART[:left])
        left -= min(left, len(PART))


async def _banner(stream: Any, rest: bytes, argument: str, access: Any) -> None:
    print("Welcome to \x1b[31mEXAMPLE\x1b[0m", file=sys.stderr, flush=True)
    await stream.write(b"220 example ESMTP\r\n")


async def _print(stream: Any, rest: bytes, argument: str, access: Any) -> None:
    print("a stray line", flush=True)
    await stream.write(b"done")


async def _who(stream: Any, rest: bytes, argument: str, access: Any) -> None:
    verbs = [verb for verb in ("read", "append", "write", "admin") if access.may("x", "y", verb)]
    await stream.write(f"{access.user} {access.default_namespace!r} {verbs}".encode())


_WORDS: dict[str, Callable[[Any, bytes, str, Any], Awaitable[None]]] = {
    "echo": _echo,
    "take": _take,
    "give": _give,
    "banner": _banner,
    "print": _print,
    "who": _who,
}

PROGRAM = f"{sys.executable} {Path(__file__).resolve()}"
"""The command line of this file as a program; arguments are ignored."""


async def _main() -> None:
    from dmsync.transports.stdio import take_stdio

    stream = take_stdio()
    await serve_peer(stream)
    await stream.aclose()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    asyncio.run(_main())
