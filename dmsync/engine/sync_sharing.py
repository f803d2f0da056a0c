"""Asking another store who shares a dot, and changing it there."""

from dmsync.core.names import full_name
from dmsync.engine.ports import ByteStream, SyncStore
from dmsync.engine.session import Session
from dmsync.engine.sync_opening import SHARING, Greeted, open_dot
from dmsync.errors import DotNotFound, VersionMismatch
from dmsync.wire.connection import Role
from dmsync.wire.messages import Intent, Refs, Share, ShareAction, Shared


async def share(
    store: SyncStore,
    stream: ByteStream,
    dot: tuple[str | None, str],
    action: ShareAction,
    user: str | None = None,
    greeted: Greeted | None = None,
) -> tuple[str, list[str]]:
    """(full name of the dot there, its collaborators afterwards); `dot` is namespace and name.

    Raises:
        DotNotFound: absent, or not for us. AccessDenied: it is somebody else's. VersionMismatch.
    """
    async with Session(stream, Role.CLIENT) as session:
        remote, _ = await open_dot(session, store, Refs(None, *dot, Intent.LIST), greeted=greeted)
        if remote.dot is None:
            raise DotNotFound(f"no dot {full_name(dot[0] or '', dot[1])} there, or not for you")
        peer = session.connection.peer
        if peer is None or SHARING not in dict(peer.capabilities):
            raise VersionMismatch("the dm there is too old to be told who shares a dot")
        await session.send(Share(action, user))
        users = list((await session.expect(Shared)).users)
        return full_name(remote.namespace, remote.name or ""), users
