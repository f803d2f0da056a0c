"""The store of the access table, and what must hold of it after each cell."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from dmsync.core.events import CollaboratorAdded
from dmsync.core.ids import ObjectId
from dmsync.engine.dots import delete_dot
from dmsync.engine.ports import ByteStream
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.errors import AccessDenied, DmError
from tools.faults.access_cells import CREATES, LIVE, NOWHERE, Answer, Cell, Dot, Level
from tools.faults.access_client import CANARY, MASTER, Attempt, Place, make_place

SETTINGS: Final = EngineSettings("scene <s@s>", actor="scene", say=lambda _: None)
_NOTHING: Final = ObjectId(bytes(32))
Connect = Callable[[Cell], Awaitable[ByteStream]]
"""A session of the cell's user. Raises AccessDenied: no login."""


@dataclass
class Scene:
    """The served store, opened here too, to look at what a cell did."""

    home: str
    store: Store = field(init=False)
    places: dict[Dot, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store.open(self.home, SETTINGS, create=True)
        for dot in (*LIVE, Dot.GONE):
            namespace, _, name = dot.value.rpartition("/")
            self.places[dot] = make_place(self.store, namespace, name)
        shared, gone = self.places[Dot.SHARED], self.places[Dot.GONE]
        with self.store.transaction("scene") as tx:
            tx.append(CollaboratorAdded(shared.id, "bob"))
        delete_dot(self.store, Dot.GONE.value)
        namespace, _, name = Dot.ABSENT.value.rpartition("/")
        self.places[Dot.ABSENT] = Place(namespace, name, gone.id)

    def close(self) -> None:
        self.store.close()

    def target(self, place: Place, ref: str) -> ObjectId:
        """What a ref of a dot stands for at the server now."""
        row = self.store.catalog.ref(place.id, ref)
        return _NOTHING if row is None else row.target

    def remove_made(self, made: str) -> None:
        """A cell that made a dot leaves the name free for the next."""
        namespace, _, name = made.rpartition("/")
        if self.store.catalog.dot_by_name(namespace, name) is not None:
            delete_dot(self.store, made)


async def try_cell(scene: Scene, cell: Cell, connect: Connect) -> str:
    """What is wrong with the cell's answer or with what it left; empty: it is as it should be."""
    if cell.verb in NOWHERE:
        raise ValueError("there is no message for this")
    place = scene.places[cell.dot]
    tip, tag = scene.target(place, MASTER), scene.target(place, "tag/known")
    before = scene.store.catalog.last_seq()
    answer, came = await _answer_to(scene, cell, connect, place, (tip, tag))
    after = scene.store.catalog.last_seq()
    wrong = "" if answer == cell.answer.value else f"was told {answer}, not {cell.answer.value}"
    is_change = cell.verb not in ("list", "refs", "known", "fetch", "clone", "share-list")
    if cell.answer is Answer.DONE and is_change:
        wrong = wrong or _actor_missing(scene, cell, after)
    elif after != before:
        wrong = wrong or "the log grew"
    if cell.verb in ("fetch", "clone") and (CANARY in came) != (cell.answer is Answer.DONE):
        wrong = wrong or "content came, or did not"
    if cell.verb in CREATES and cell.dot not in LIVE:
        scene.remove_made(cell.dot.value)
    if cell.verb in CREATES and cell.user.is_at_home:
        scene.remove_made(f"{cell.user.login}/{Dot.TOP.value}")
    if cell.verb == "share-add" and answer == Answer.DONE.value:
        await _answer_to(scene, _of(cell, "share-remove"), connect, place, (tip, tag))
    return wrong


def _of(cell: Cell, verb: str) -> Cell:
    return Cell(cell.user, cell.dot, verb, cell.answer)


async def _answer_to(
    scene: Scene, cell: Cell, connect: Connect, place: Place, refs: tuple[ObjectId, ObjectId]
) -> tuple[str, bytes]:
    try:
        stream = await connect(cell)
    except AccessDenied:
        return Answer.NO_LOGIN.value, b""
    try:
        return Answer.DONE.value, await Attempt(scene.store, stream, place, *refs).run(cell.verb)
    except DmError as exc:
        return exc.code, b""


def _actor_missing(scene: Scene, cell: Cell, last_seq: int) -> str:
    """The log has to name who did it, by user and, where there is one, key."""
    row = scene.store.catalog.operation_with(last_seq)
    actor = "" if row is None else row.actor
    login = cell.user.login.removeprefix("@")
    if actor.split(" ")[0] != login and cell.user.login[:1] != "@":
        return f"the log names {actor!r}"
    return "" if cell.user.levels[0] > Level.NO_LOGIN else "done without a login"
