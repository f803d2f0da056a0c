"""A client that asks for one thing and says what it was told, whatever its key may do.

It speaks frames itself: nothing of what the ordinary client refuses, leaves out or works out
beforehand stands between the question and the server.
"""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from dmsync.core.events import CommitsAdded, DotCreated, RefChanged
from dmsync.core.ids import DotId, Kind, ObjectId, object_id, short_key
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout
from dmsync.core.pages import write_directory
from dmsync.core.records import Encoding, Record, encode_record
from dmsync.engine.ports import ByteStream
from dmsync.engine.session import Session
from dmsync.engine.store import Store
from dmsync.engine.sync_opening import hello
from dmsync.errors import DotNotFound
from dmsync.wire.connection import Role
from dmsync.wire.messages import (
    Done,
    DotsReply,
    Fetch,
    Hello,
    Intent,
    KnownQuery,
    KnownReply,
    ListDots,
    Plan,
    Push,
    Ready,
    Records,
    RefMode,
    Refs,
    RefsReply,
    RefUpdate,
    Result,
    Share,
    ShareAction,
    Shared,
    Update,
)

CANARY: Final = b"the canary sings in this file only: "
MASTER: Final = "branch/master"


def make_commit(root: Entry, parents: tuple[ObjectId, ...]) -> bytes:
    """A commit that nobody has made before."""
    return Commit(root, parents, "m <m@m>", "m <m@m>", 1, 0, os.urandom(8).hex()).to_bytes()


@dataclass
class Place:
    """One dot of the scene as whoever set it up knows it, access or not."""

    namespace: str
    name: str
    id: DotId
    root: Entry = ROOT_ENTRY
    first: ObjectId = field(default=ObjectId(bytes(32)))
    """The root of its history."""


def make_place(store: Store, namespace: str, name: str) -> Place:
    """A dot with a file, two commits on master, and a tag."""
    dot = DotId(os.urandom(16))
    with store.transaction("scene") as tx:
        tx.append(DotCreated(dot, namespace, name, "scene"))
    objects = store.objects(dot)
    with objects.writer() as writer:
        content = CANARY + f"{namespace}/{name}".encode()
        chunk = writer.put(Kind.CHUNK, content)
        entry = Entry(
            b"canary",
            EntryKind.FILE,
            0o644,
            size=len(content),
            content=chunk,
            layout=Layout.SINGLE,
        )
        root = Entry(b"", EntryKind.DIRECTORY, 0o755, tree=write_directory(writer, [entry]))
        first = writer.put(Kind.COMMIT, make_commit(root, ()))
        second = writer.put(Kind.COMMIT, make_commit(root, (first,)))
        writer.seal()
    with store.transaction("scene") as tx:
        tx.append(CommitsAdded(dot, (first, second)))
        tx.append(RefChanged(dot, MASTER, None, second, "commit"))
        tx.append(RefChanged(dot, "tag/known", None, second, "tag"))
    return Place(namespace, name, dot, root, first)


@dataclass
class Attempt:
    """One session about one dot. `tip` and `tag`: what they stand for at the server now."""

    store: Store
    stream: ByteStream
    place: Place
    tip: ObjectId
    tag: ObjectId

    async def run(self, verb: str) -> bytes:
        """Do it; what of the dot's content came. Raises DmError: what the server said."""
        async with Session(self.stream, Role.CLIENT) as session:
            await session.send(hello(self.store))
            await session.expect(Hello)
            return await _VERBS[verb](self, session)

    # --- questions --------------------------------------------------------------------------------

    async def _named(self, session: Session) -> RefsReply:
        intent = Intent.LIST
        await session.send(Refs(None, self.place.namespace, self.place.name, intent))
        return await session.expect(RefsReply)

    async def _list(self, session: Session) -> bytes:
        await session.send(ListDots())
        dots = (await session.expect(DotsReply)).dots
        if not any(dot.dot == self.place.id for dot in dots):
            raise DotNotFound("nothing of it is seen")
        return b""

    async def _refs(self, session: Session) -> bytes:
        reply = await self._named(session)
        if reply.dot is None:
            if reply.refs or reply.head or reply.hollow or reply.subdots:
                raise AssertionError("a dot that is not there has refs")
            raise DotNotFound("nothing of it is seen")
        return b""

    async def _known(self, session: Session) -> bytes:
        await self._named(session)
        await session.send(KnownQuery((self.tip,)))
        if not any((await session.expect(KnownReply)).states):
            raise DotNotFound("nothing of it is seen")
        return b""

    async def _fetch(self, session: Session) -> bytes:
        await self._named(session)
        await session.send(Fetch(os.urandom(16), self.place.id, (self.tip,), ()))
        came = b""
        while not isinstance(message := await session.receive(), Done):
            if isinstance(message, Records):
                came += message.joined
        return came

    # --- changes ----------------------------------------------------------------------------------

    async def _push(self, session: Session) -> bytes:
        new = make_commit(self.place.root, (self.tip,))
        return await self._send(session, [RefUpdate(MASTER, RefMode.FF, None, _id(new))], new)

    async def _diverged(self, session: Session, mode: RefMode) -> bytes:
        new = make_commit(self.place.root, (self.place.first,))
        expected = self.tip if mode is RefMode.LEASE else None
        return await self._send(session, [RefUpdate(MASTER, mode, expected, _id(new))], new)

    async def _force(self, session: Session) -> bytes:
        return await self._diverged(session, RefMode.LEASE)

    async def _stash(self, session: Session) -> bytes:
        return await self._diverged(session, RefMode.STASH)

    async def _create_ref(self, session: Session, space: str) -> bytes:
        ref = f"{space}/n{os.urandom(4).hex()}"
        return await self._send(session, [RefUpdate(ref, RefMode.CREATE, None, self.tip)])

    async def _create_branch(self, session: Session) -> bytes:
        return await self._create_ref(session, "branch")

    async def _create_tag(self, session: Session) -> bytes:
        return await self._create_ref(session, "tag")

    async def _move_tag(self, session: Session) -> bytes:
        to = self.place.first if self.tag != self.place.first else self.tip
        return await self._send(session, [RefUpdate("tag/known", RefMode.LEASE, self.tag, to)])

    async def _create_dot(self, session: Session) -> bytes:
        return await self._create(session, DotId(os.urandom(16)))

    async def _revive_dot(self, session: Session) -> bytes:
        return await self._create(session, self.place.id)

    async def _create(self, session: Session, dot: DotId) -> bytes:
        """Make a dot of that name, under whatever id."""
        reply = await self._named(session)
        if reply.dot is not None:  # it is there, and for us: the name is taken
            return await self._push(session)
        new = make_commit(ROOT_ENTRY, ())
        update = RefUpdate(MASTER, RefMode.FF, None, _id(new))
        return await self._send(session, [update], new, dot=dot, create=True)

    async def _send(
        self,
        session: Session,
        updates: list[RefUpdate],
        new: bytes | None = None,
        *,
        dot: DotId | None = None,
        create: bool = False,
    ) -> bytes:
        if not create:
            await self._named(session)
        transfer = os.urandom(16)
        place = self.place
        push = Push(
            transfer,
            transfer,
            dot or place.id,
            place.namespace,
            place.name,
            create,
            True,
            tuple(updates),
            () if create else (self.tip,),
        )
        if new is None:
            plan = Plan(0, b"", b"", 0, 0, eager=True)
            await session.send(push, plan, Update(transfer, 0))
        else:
            plan = Plan(0, bytes((Kind.COMMIT,)), short_key(_id(new)), 1, len(new), eager=True)
            record = encode_record(Record(Kind.COMMIT, Encoding.RAW, len(new), new))
            await session.send(push, plan, Records(record), Update(transfer, 1))
        await session.expect(Ready)
        result = await session.expect(Result)
        if any(outcome.code for outcome in result.outcomes):
            raise AssertionError(f"refused after all: {result.outcomes}")
        return b""

    # --- sharing ----------------------------------------------------------------------------------

    async def _share(self, session: Session, action: ShareAction, user: str | None) -> bytes:
        await self._named(session)
        await session.send(Share(action, user))
        await session.expect(Shared)
        return b""

    async def _share_list(self, session: Session) -> bytes:
        return await self._share(session, ShareAction.LIST, None)

    async def _share_add(self, session: Session) -> bytes:
        return await self._share(session, ShareAction.ADD, "zoe")

    async def _share_remove(self, session: Session) -> bytes:
        """Somebody has to be there to be removed: whoever may, adds them first."""
        await self._share(session, ShareAction.ADD, "zoe")
        return await self._share(session, ShareAction.REMOVE, "zoe")


def _id(commit: bytes) -> ObjectId:
    return object_id(Kind.COMMIT, commit)


_VERBS: Final[dict[str, Callable[[Attempt, Session], Awaitable[bytes]]]] = {
    "list": Attempt._list,
    "refs": Attempt._refs,
    "known": Attempt._known,
    "fetch": Attempt._fetch,
    "clone": Attempt._fetch,
    "push": Attempt._push,
    "create-branch": Attempt._create_branch,
    "create-tag": Attempt._create_tag,
    "force": Attempt._force,
    "move-tag": Attempt._move_tag,
    "stash": Attempt._stash,
    "share-list": Attempt._share_list,
    "share-add": Attempt._share_add,
    "share-remove": Attempt._share_remove,
    "create-dot": Attempt._create_dot,
    "revive-dot": Attempt._revive_dot,
}
