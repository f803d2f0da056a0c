"""The closure of commits, walked page by page: what of it is not here or not sound, and which paths
that harms. Trusts nothing but hashes."""

from collections.abc import Iterator

from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import Entry, EntryKind, commit_from_bytes
from dmsync.core.objects import Layout as FileLayout
from dmsync.core.pages import DIRECTORY, Span, read_page
from dmsync.engine.content_checks import check_content
from dmsync.engine.progress import Progress
from dmsync.engine.tree_pages import chunks_of, in_scope, pages_below
from dmsync.errors import BadObject, ContentAbsent, Corruption, DmError
from dmsync.storage.object_store import ObjectStore

DAMAGE_NAMED_MAX = 64
"""Damaged objects told apart below one page; with more, only the first ones name their commits."""
PATHS_NAMED_MAX = 16

FileKey = tuple[FileLayout, ObjectId | None, int, bytes]
"""Equal ones need one check: layout, manifest, size, content id."""
_NONE: frozenset[ObjectId] = frozenset()


class Closure:
    """Walks trees; each page once. Remembers only pages below which something is damaged."""

    def __init__(
        self,
        objects: ObjectStore,
        *,
        full: bool,
        progress: Progress,
        scope: frozenset[bytes] | None = None,
    ) -> None:
        self.pages: set[ObjectId] = set()
        self._roots: set[ObjectId] = set()
        """Pages of roots of which only the entries in `scope` were walked."""
        self._scope = scope
        self.chunks = 0
        self.reasons: dict[ObjectId, str] = {}
        self.kinds: dict[ObjectId, Kind] = {}
        """Of `reasons`, what cannot be read: the others are here, and not what they should be."""
        self._objects = objects
        self._full = full
        self._progress = progress
        self._damage: dict[ObjectId, frozenset[ObjectId]] = {}
        self._chunk_bytes: dict[ObjectId, int] = {}
        """Length of every chunk that was read."""
        self._bytes_read = 0
        self._files: dict[FileKey, str] = {}
        """What is wrong with each file that was checked, or "" for nothing."""

    def damage_of_commit(
        self, commit: ObjectId, payload: bytes | None, *, is_hollow: bool = False
    ) -> frozenset[ObjectId]:
        """What is missing or harmed of a commit: itself, pages, chunks."""
        try:
            stored = self._objects.read_commit(commit)
            if payload is not None and object_id(Kind.COMMIT, payload) != commit:
                raise Corruption("the commit's row in the catalog is not the commit")
            root = commit_from_bytes(stored, trusted=True).root
        except DmError as error:
            self.reasons[commit] = error.message
            self.kinds[commit] = Kind.COMMIT
            return frozenset((commit,))
        return _NONE if is_hollow else self._damage_of_tree(root)

    @property
    def pages_count(self) -> int:
        return len(self.pages | self._roots)

    def _damage_of_tree(self, root: Entry) -> frozenset[ObjectId]:
        if root.tree is None:
            return _NONE
        self._walk(root.tree)
        return self._damage.get(root.tree, _NONE)

    def _walk(self, root: ObjectId) -> None:
        """Depth first without recursion: a hostile tree may be deep."""
        stack = [_Step(root, DIRECTORY, self._scope)]
        while stack:
            step = stack[-1]
            if step.children is None:
                walked = self.pages if step.scope is None else self._roots
                if step.page in walked:
                    stack.pop()
                    continue
                walked.add(step.page)
                step.children = self._open(step)
            child = next(step.children, None)
            if child is not None:
                step.seen.append(child.page)
                stack.append(child)
                continue
            stack.pop()
            self._close(step)

    def _open(self, step: "_Step") -> "Iterator[_Step]":
        try:
            page = read_page(self._objects, step.page, step.page_type)
        except DmError as error:
            if not isinstance(error, BadObject):
                self.kinds[step.page] = Kind.PAGE
            self._blame(step, step.page, error.message)
            return iter(())
        self._tell()
        for span in chunks_of(page, step.scope):
            self._check_chunk(step, span)
        if self._full and page.type == DIRECTORY and page.level == 0:
            for entry in in_scope(page, step.scope):
                self._check_file(step, entry)
        return (_Step(*below) for below in pages_below(page, step.scope))

    def _check_chunk(self, step: "_Step", span: Span) -> None:
        chunk = span.chunk
        if chunk in self.reasons:
            step.damage.add(chunk)
            return
        if not self._full:
            self.chunks += 1
            if not self._objects.has_key(chunk[:8]):
                self.kinds[chunk] = Kind.CHUNK
                self._blame(step, chunk, f"chunk {chunk.hex()[:12]} is not in this dot")
            return
        if chunk not in self._chunk_bytes:
            self.chunks += 1
            try:
                self._chunk_bytes[chunk] = len(self._objects.read(Kind.CHUNK, chunk))
            except DmError as error:
                self.kinds[chunk] = Kind.CHUNK
                self._blame(step, chunk, error.message)
                return
            self._bytes_read += self._chunk_bytes[chunk]
            self._tell()
        if self._chunk_bytes[chunk] != span.length:
            self._blame(step, step.page, f"chunk {chunk.hex()[:12]} is not as long as its span")

    def _check_file(self, step: "_Step", entry: Entry) -> None:
        """The content id must be that of the chunks; what cannot be read is told elsewhere."""
        if entry.kind is not EntryKind.FILE:
            return
        key = (entry.layout, entry.tree, entry.size, entry.content)
        if key not in self._files:
            self._files[key] = ""
            try:
                for _ in check_content(self._objects, entry):
                    pass
            except BadObject as error:
                self._files[key] = error.message
            except (Corruption, ContentAbsent):
                pass  # the walk names the page or chunk
        if self._files[key]:
            name = entry.name.decode("utf-8", "backslashreplace")
            self._blame(step, step.page, f"file {name!a}: {self._files[key]}")

    def paths_of(self, bad: ObjectId, commit: ObjectId) -> list[bytes]:
        """Paths in `commit` of what holds `bad`, as far as its tree can be read: files, and
        directories that are harmed themselves; at most PATHS_NAMED_MAX."""
        found: list[bytes] = []
        try:
            root = commit_from_bytes(self._objects.read_commit(commit), trusted=True).root
        except DmError:
            return found
        waiting = [] if root.tree is None else [(root.tree, b"")]
        while waiting and len(found) < PATHS_NAMED_MAX:
            directory, path = waiting.pop()
            if bad not in self._damage.get(directory, _NONE):
                continue
            if not self._names_below(bad, directory, path, waiting, found) and directory == bad:
                found.append(path or b".")
        return sorted(found)

    def _names_below(
        self,
        bad: ObjectId,
        directory: ObjectId,
        path: bytes,
        waiting: list[tuple[ObjectId, bytes]],
        found: list[bytes],
    ) -> bool:
        """Go through the pages of one directory that have `bad` below; False when none of its
        entries has: the directory itself is what is harmed."""
        pages, is_named = [directory], False
        while pages:
            page_id = pages.pop()
            if page_id == bad:
                found.append(path or b".")
                is_named = True
                continue
            try:
                page = read_page(self._objects, page_id, DIRECTORY)
            except DmError:
                continue
            if page.level > 0:
                pages += [
                    child.page for child in page.items if bad in self._damage.get(child.page, _NONE)
                ]
                continue
            for entry in page.items:
                inner = path + b"/" + entry.name if path else entry.name
                if entry.kind is EntryKind.DIRECTORY and entry.tree is not None:
                    if bad in self._damage.get(entry.tree, _NONE):
                        waiting.append((entry.tree, inner))
                        is_named = True
                elif entry.kind is EntryKind.FILE and self._is_in_file(bad, entry):
                    found.append(inner)
                    is_named = True
        return is_named

    def _is_in_file(self, bad: ObjectId, entry: Entry) -> bool:
        if entry.layout is FileLayout.SINGLE:
            return entry.content == bad
        return entry.tree is not None and bad in self._damage.get(entry.tree, _NONE)

    def _tell(self) -> None:
        self._progress.reached(self._bytes_read, len(self.pages) + self.chunks)

    def _blame(self, step: "_Step", bad: ObjectId, reason: str) -> None:
        self.reasons[bad] = reason
        step.damage.add(bad)

    def _close(self, step: "_Step") -> None:
        for child in step.seen:
            step.damage |= self._damage.get(child, _NONE)
        if step.damage:
            self._damage[step.page] = frozenset(sorted(step.damage)[:DAMAGE_NAMED_MAX])


class _Step:
    """One page on the way down; with `scope` only these entries of it count."""

    __slots__ = ("children", "damage", "page", "page_type", "scope", "seen")

    def __init__(
        self, page: ObjectId, page_type: int, scope: frozenset[bytes] | None = None
    ) -> None:
        self.page = page
        self.page_type = page_type
        self.scope = scope
        self.children: Iterator[_Step] | None = None
        self.seen: list[ObjectId] = []
        self.damage: set[ObjectId] = set()
