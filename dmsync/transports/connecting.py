"""Reaching a remote, whatever kind it is."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dmsync.core.names import RemoteUrl
from dmsync.storage.stages import stage
from dmsync.transports.ssh_settings import SshSettings
from dmsync.transports.streams import PeerStream


@asynccontextmanager
async def connect(url: RemoteUrl, settings: SshSettings) -> AsyncIterator[PeerStream]:
    """A stream to a remote's `dm serve --stdio`, closed at the end of the block.

    Raises:
        HostKeyRejected, AccessDenied, NetworkError, NotADmServer: see `connect_ssh`; some of them
            only at the first read, when an ssh command stands between.
        ConfigError, UsageError: settings or a URL that cannot be used.
    """
    with stage("connect"):
        stream = await _connect(url, settings)
    if settings.limit_bytes_per_s is not None:
        from dmsync.transports.limited_stream import LimitedStream

        stream = LimitedStream(stream, settings.limit_bytes_per_s)
    try:
        yield stream
    finally:
        await stream.aclose()


async def _connect(url: RemoteUrl, settings: SshSettings) -> PeerStream:
    # Imported only when needed: asyncssh costs a tenth of a second.
    if url.kind == "local":
        from dmsync.transports.local import connect_local

        return await connect_local(url)
    if settings.ssh_command is not None:
        from dmsync.transports.ssh_command import connect_by_command

        return await connect_by_command(url, settings.ssh_command, settings.dm_command)
    from dmsync.transports.ssh_client import connect_ssh

    return await connect_ssh(url, settings)
