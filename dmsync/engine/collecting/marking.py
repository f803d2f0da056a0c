"""Marking: everything that the live commits of a dot need, by walking their trees.

Trusts neither commit deltas nor the index's word for a page: each page is read, once. Something
that is missing stops the collection before anything is removed: an incomplete list of what is
needed is no licence to delete.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from dmsync.core.graph import ancestors_difference
from dmsync.core.ids import DotId, Kind, ObjectId, object_id, short_key
from dmsync.core.objects import commit_from_bytes, tag_from_bytes
from dmsync.core.pages import DIRECTORY, decode_page
from dmsync.engine.collecting.roots import (
    Grace,
    Root,
    extend_grace,
    require_whole_history,
    roots_of,
)
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.store import Store
from dmsync.engine.tree_pages import PageBelow, Scope, chunks_of, pages_below
from dmsync.errors import ContentAbsent, Corruption
from dmsync.storage.stages import stage

_BATCH: Final = 256

Keys = set[bytes]
"""Short keys, some 90 bytes each."""


class Marking:
    """What is live of one dot so far. `mark` may be called again when more has become live."""

    def __init__(self, store: Store, dot: DotId, grace: Grace, progress: Progress = SILENT) -> None:
        self._store = store
        self._dot = dot
        self._grace = grace
        self._progress = progress
        self.seq = 0
        """The event up to which everything named has been marked."""
        self.commits: set[ObjectId] = set()
        """Live commits, hollow ones too, and stored states that no ref names."""
        self.held: dict[str, Keys] = {}
        """What each kind of root needs beyond those before it."""
        self.by_grace: Keys = set()
        """What only the grace keeps."""
        self.by_grace_commits: set[ObjectId] = set()
        self.roots: list[Root] = []
        self._walked: dict[Scope, set[ObjectId]] = {}
        self._tried: set[ObjectId] = set()
        """Pages of trees that need not be complete."""
        self._scope: Scope = store.scope(dot)
        self._without_tree: set[ObjectId] = set()
        """Live commits that were hollow when they were marked."""
        self._tips: list[ObjectId] = []
        self._added: list[bytes] = []

    def is_live(self, key: bytes) -> bool:
        if key in self.by_grace:
            return True
        return any(key in keys for keys in self.held.values())

    def is_complete(self, page: ObjectId) -> bool:
        """Is a tree's root live, with all that it names?"""
        return any(page in pages for pages in self._walked.values())

    def mark(self) -> list[bytes]:
        """Mark what is named now; returns the keys that became live since the last time.

        Raises:
            Corruption: something that is needed is missing.
        """
        self._store.catalog.refresh()
        self.seq = self._store.catalog.last_seq()
        require_whole_history(self._store, self._dot)
        extend_grace(self._store, self._grace)
        hollow = set(self._store.catalog.hollow_commits(self._dot))
        scope = self._store.scope(self._dot)
        if scope != self._scope:  # more of every tree is needed
            self._scope = scope
            self._tips.clear()
            self.commits.clear()
        self.roots = roots_of(self._store, self._dot)
        with stage("plan"):
            for root in self.roots:
                keys = self.held.setdefault(root.why, set())
                if root.tag is not None:
                    self._add(keys, root.tag)
                if root.commit is not None:
                    self._mark_commits([root.commit], keys, hollow, scope)
            self._mark_filled(hollow, scope)
            self._mark_grace(hollow, scope)
        added, self._added = self._added, []
        return added

    def _mark_filled(self, hollow: set[ObjectId], scope: Scope) -> None:
        """Commits that were hollow when they were marked, and whose content has come since."""
        filled = sorted(self._without_tree - hollow)
        self._without_tree.intersection_update(hollow)
        for commit in filled:
            keys = self.held.setdefault("history", set())
            self._walk(self._tree_of(self._payload(commit), scope), keys)

    def _mark_grace(self, hollow: set[ObjectId], scope: Scope) -> None:
        before = set(self.commits)
        catalog, keys = self._store.catalog, self.by_grace
        objects = self._store.objects(self._dot)
        for named in self._grace.commits.get(self._dot, {}):
            if catalog.is_forgotten(self._dot, named) or named in self.commits:
                continue
            if catalog.has_commit(self._dot, named) or objects.has(Kind.COMMIT, named):
                self._mark_commits([named], keys, hollow, scope)
            elif objects.has(Kind.TAG, named):
                self._add(keys, named)
                target = tag_from_bytes(objects.read(Kind.TAG, named)).target
                if catalog.has_commit(self._dot, target) and target not in self.commits:
                    self._mark_commits([target], keys, hollow, scope)
        self.by_grace_commits |= self.commits - before
        # content that was given up a short while ago stays as far as it is there
        for commit in self._grace.thinned.get(self._dot, ()):
            if commit in hollow and commit in self.commits:
                self._try_tree(commit, keys, scope)
        for old in self._grace.scopes.get(self._dot, ()):
            if old != scope:
                for commit in self.commits - hollow:
                    self._try_tree(commit, keys, old)

    def keep(self, commits: Iterable[ObjectId]) -> None:
        """Let commits stay that could not be recorded as gone, as far as they are there."""
        scope = self._store.scope(self._dot)
        for commit in commits:
            if commit not in self.commits:
                self.commits.add(commit)
                self._add(self.by_grace, commit)
                self._try_tree(commit, self.by_grace, scope)

    # --- commits ------------------------------------------------------------------------------

    def _mark_commits(
        self, tips: Sequence[ObjectId], keys: Keys, hollow: set[ObjectId], scope: Scope
    ) -> None:
        """Commits with all their ancestors, and the trees of those that are not hollow."""
        graph = self._store.catalog.graph(self._dot)
        known: list[ObjectId] = []
        trees: list[PageBelow] = []
        for tip in tips:
            if graph.has(tip):
                known.append(tip)
            elif tip not in self.commits:
                known += [p for p in self._mark_state(tip, keys, trees, scope) if graph.has(p)]
        fresh = ancestors_difference(graph, known, self._tips)
        for commits in _batches(c for c in fresh if c not in self.commits):
            self._require(commits)
            for commit in commits:
                self._mark_one(commit, keys)
                if commit in hollow:
                    self._without_tree.add(commit)
                else:
                    trees += self._tree_of(self._payload(commit), scope)
            self._walk(trees, keys)
            trees = []
        self._walk(trees, keys)
        self._tips += [tip for tip in known if tip not in self._tips]

    def _mark_state(
        self, commit: ObjectId, keys: Keys, trees: list[PageBelow], scope: Scope
    ) -> tuple[ObjectId, ...]:
        """A stored state that the graph does not know; returns what it was made on."""
        payload = self._store.objects(self._dot).read_commit(commit)
        self._mark_one(commit, keys)
        trees += self._tree_of(payload, scope)
        return commit_from_bytes(payload, trusted=True).parents

    def _mark_one(self, commit: ObjectId, keys: Keys) -> None:
        self.commits.add(commit)
        self._add(keys, commit)
        self._progress.reached(0, len(self.commits))

    def _require(self, commits: Sequence[ObjectId]) -> None:
        """Their records are in the packs, also of hollow ones."""
        objects = self._store.objects(self._dot)
        with objects.lock:
            found = objects.sealed.first_places([short_key(commit) for commit in commits])
        for commit in commits:
            if short_key(commit) not in found and not objects.has(Kind.COMMIT, commit):
                raise objects.missing(Kind.COMMIT, commit)

    def _payload(self, commit: ObjectId) -> bytes:
        row = self._store.catalog.commit(self._dot, commit)
        if row is None or object_id(Kind.COMMIT, row.payload) != commit:
            return self._store.objects(self._dot).read_commit(commit)
        return row.payload

    @staticmethod
    def _tree_of(payload: bytes, scope: Scope) -> list[PageBelow]:
        root = commit_from_bytes(payload, trusted=True).root
        return [] if root.tree is None else [PageBelow(root.tree, DIRECTORY, scope)]

    # --- trees --------------------------------------------------------------------------------

    def _walk(self, trees: list[PageBelow], keys: Keys) -> None:
        """Every page once, many at a time. Raises Corruption."""
        stack = trees
        while stack:
            batch: dict[ObjectId, PageBelow] = {}
            while stack and len(batch) < _BATCH:
                below = stack.pop()
                walked = self._walked.setdefault(below.scope, set())
                if below.page not in walked:
                    walked.add(below.page)
                    batch[below.page] = below
            stack += self._open(batch, keys)

    def _open(self, batch: dict[ObjectId, PageBelow], keys: Keys) -> list[PageBelow]:
        objects = self._store.objects(self._dot)
        found: list[PageBelow] = []
        chunks: list[ObjectId] = []
        try:
            for below, data in zip(
                batch.values(), objects.read_many(Kind.PAGE, list(batch)), strict=True
            ):
                self._add(keys, below.page)
                page = decode_page(data, below.page_type, trusted=True)
                chunks += [span.chunk for span in chunks_of(page, below.scope)]
                found += pages_below(page, below.scope)
        except ContentAbsent as exc:
            raise Corruption(exc.message, hint=exc.hint, **exc.facts) from exc
        self._mark_chunks(chunks, keys)
        return found

    def _mark_chunks(self, chunks: list[ObjectId], keys: Keys) -> None:
        fresh = [chunk for chunk in dict.fromkeys(chunks) if not self.is_live(short_key(chunk))]
        objects = self._store.objects(self._dot)
        for part in _batches(fresh):
            with objects.lock:
                there = objects.sealed.first_places([short_key(chunk) for chunk in part])
            for chunk in part:
                # the exact way, which also looks for packs that were sealed or joined just now
                if short_key(chunk) not in there and not objects.has(Kind.CHUNK, chunk):
                    raise objects.missing(Kind.CHUNK, chunk)
                self._add(keys, chunk)

    def _try_tree(self, commit: ObjectId, keys: Keys, scope: Scope) -> None:
        """As much of a commit's tree as is there."""
        objects = self._store.objects(self._dot)
        try:
            stack = self._tree_of(objects.read_commit(commit), scope)
        except Corruption:
            return
        while stack:
            below = stack.pop()
            if below.page in self._tried:
                continue
            self._tried.add(below.page)
            try:
                page = decode_page(objects.read_page(below.page), below.page_type, trusted=True)
            except (Corruption, ContentAbsent):
                continue
            self._add(keys, below.page)
            for span in chunks_of(page, below.scope):
                if objects.has_key(short_key(span.chunk)):
                    self._add(keys, span.chunk)
            stack += pages_below(page, below.scope)

    def _add(self, keys: Keys, oid: ObjectId) -> None:
        key = short_key(oid)
        if not self.is_live(key):
            keys.add(key)
            self._added.append(key)


def _batches(ids: Iterable[ObjectId]) -> Iterator[list[ObjectId]]:
    batch: list[ObjectId] = []
    for oid in ids:
        batch.append(oid)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
