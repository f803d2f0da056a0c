"""The merge that is under way in a branch's tree, and what other commands ask about it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from dmsync.core.encoding import decode, encode
from dmsync.core.events import CONFLICT_DETAIL_BYTES_MAX
from dmsync.core.ids import DotId
from dmsync.core.objects import Commit, commit_from_bytes
from dmsync.core.values import plain_value_type
from dmsync.engine.store import Store
from dmsync.errors import Corruption, MergeConflict, NotFound
from dmsync.storage.catalog_rows import ConflictRow, MergeRow

if TYPE_CHECKING:
    from dmsync.engine.databases.sqlite_merge import RowConflict
    from dmsync.engine.merging.trees import Copy, FoundConflict, Scope

DETAIL_VERSION: Final = 1
_ROWS_BYTES_MAX: Final = CONFLICT_DETAIL_BYTES_MAX // 2
_PATHS_SHOWN: Final = 3


@plain_value_type
class ConflictInfo:
    """A conflict of the merge under way. `resolved` says how it was decided, None while open; the
    other fields as in trees.FoundConflict."""

    path: bytes
    reason: str
    scope: "Scope"
    sides: tuple[str, ...]
    copies: "tuple[Copy, ...]"
    members: tuple[bytes, ...]
    also: tuple[bytes, ...]
    rows: "tuple[RowConflict, ...]"
    resolved: str | None = None


def encode_detail(conflict: "FoundConflict | ConflictInfo") -> bytes:
    """What the log keeps of a conflict besides path and reason. Rows that are too many to keep are
    left out: the conflict is then decided for the file as a whole."""
    import json  # which a commit without conflicts needs not

    rows = tuple(json.dumps(row.to_json(), separators=(",", ":")) for row in conflict.rows)
    scope = conflict.scope
    if sum(map(len, rows)) > _ROWS_BYTES_MAX:
        scope, rows = "whole", ()
    return encode(
        (
            DETAIL_VERSION,
            scope,
            conflict.sides,
            tuple((copy.side, copy.member, copy.path) for copy in conflict.copies),
            conflict.members,
            conflict.also,
            rows,
        )
    )


def decode_conflict(row: ConflictRow) -> ConflictInfo:
    """Raises Corruption for a detail this dmsync cannot read."""
    import json

    from dmsync.engine.databases.sqlite_merge import RowConflict
    from dmsync.engine.merging.trees import Copy

    try:
        version, scope, sides, copies, members, also, rows = decode(row.detail)
        if version != DETAIL_VERSION:
            raise ValueError(version)
        return ConflictInfo(
            path=row.path,
            reason=row.reason,
            scope=cast("Scope", scope),
            sides=sides,
            copies=tuple(Copy(*copy) for copy in copies),
            members=members,
            also=also,
            rows=tuple(RowConflict.from_json(json.loads(text)) for text in rows),
            resolved=row.resolved,
        )
    except (ValueError, TypeError, KeyError) as exc:
        raise Corruption("a recorded conflict cannot be read", hint="dm merge --abort") from exc


def list_conflicts(store: Store, dot: DotId, branch: str | None = None) -> list[ConflictInfo]:
    """Conflicts of the merge into `branch` (default: the current one) by path, resolved ones too.

    Empty when no merge is under way.
    """
    rows = store.catalog.conflicts(dot, branch or store.catalog.head(dot))
    return [decode_conflict(row) for row in rows]


def require_merge(store: Store, dot: DotId, branch: str) -> MergeRow:
    """Raises NotFound when nothing is being merged into the branch."""
    row = store.catalog.merge(dot, branch)
    if row is None:
        raise NotFound(f"no merge into {branch} is under way", branch=branch)
    return row


def refuse_merging(store: Store, dot: DotId, branch: str) -> None:
    """Refuse what cannot be done in the middle of a merge. Raises MergeConflict."""
    row = store.catalog.merge(dot, branch)
    if row is not None:
        raise MergeConflict(
            f"a {row.kind} into {branch} is under way",
            hint="dm merge --continue when all is resolved (dm conflicts lists what is not), "
            "or dm merge --abort",
            kind=row.kind,
            branch=branch,
        )


def refuse_open_conflicts(store: Store, dot: DotId, branch: str) -> None:
    """Refuse to conclude a merge in which something is undecided. Raises MergeConflict."""
    left = [row.path for row in store.catalog.conflicts(dot, branch) if row.resolved is None]
    if left:
        raise MergeConflict(
            f"{len(left)} conflict{'' if len(left) == 1 else 's'} to resolve: {_shown(left)}",
            hint="dm conflicts lists them; dm resolve PATH --ours|--theirs|--base|--as-is decides",
            conflicts=len(left),
        )


def _shown(paths: Sequence[bytes]) -> str:
    shown = [path.decode("utf-8", "backslashreplace") for path in paths[:_PATHS_SHOWN]]
    return ", ".join(shown) + (", ..." if len(paths) > _PATHS_SHOWN else "")


def pending_commit(store: Store, dot: DotId, row: MergeRow) -> Commit:
    """The snapshot the tree was given: it carries author and metadata of the commit to be."""
    return commit_from_bytes(store.objects(dot).read_commit(row.snapshot), trusted=True)
