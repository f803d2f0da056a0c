"""Merges of random trees against a dictionary: what each path must hold, and what must not be lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsync.core.ids import Kind
from dmsync.core.objects import ROOT_ENTRY, Entry, EntryKind, Layout
from dmsync.core.pages import walk_tree
from dmsync.engine.merging.drivers import Bench
from dmsync.engine.merging.edits import edited
from dmsync.engine.merging.trees import MergedTree, MergeRules, merge_trees
from dmsync.storage.layout import Layout as StoreLayout
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_writer import PackWriter

PATHS = [b"a", b"b", b"c", b"d", b"d/a", b"d/b", b"d/e", b"d/e/a", b"d/e/b", b"f/a", b"f/b", b"g"]

File = tuple[bytes, int]
"""Content and mode."""
Files = dict[bytes, File]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(str(tmp_path_factory.mktemp("dots") / ("ab" * 16))) as store:
        yield store


def entry_of(writer: PackWriter, file: File, hardlink: bytes = b"") -> Entry:
    data, mode = file
    chunk = writer.put(Kind.CHUNK, data)
    return Entry(
        name=b"x",
        kind=EntryKind.FILE,
        mode=mode,
        size=len(data),
        content=chunk,
        layout=Layout.SINGLE,
        hardlink=hardlink,
    )


def root_of(writer: PackWriter, files: Files, links: dict[bytes, bytes] | None = None) -> Entry:
    entries = {
        path: entry_of(writer, file, (links or {}).get(path, b"")) for path, file in files.items()
    }
    parents: set[bytes] = set()
    for path in files:
        while b"/" in path:
            path = path.rpartition(b"/")[0]
            parents.add(path)
    root = ROOT_ENTRY
    for parent in sorted(parents):  # a directory is made by an edit of its own
        directory = Entry(name=b"x", kind=EntryKind.DIRECTORY, mode=0o755)
        root = edited(writer, root, {parent: directory})
    return edited(writer, root, entries)


def files_of(writer: PackWriter, root: Entry) -> Files:
    return {
        path: (writer.read_chunk(entry.content), entry.mode)  # type: ignore[arg-type]
        for path, entry in walk_tree(writer, root)
        if entry.kind is EntryKind.FILE
    }


def without_clashes(files: Files) -> Files:
    """No path below a file."""
    return {
        path: file
        for path, file in files.items()
        if not any(path.startswith(other + b"/") for other in files)
    }


contents = st.sampled_from([b"\0one", b"\0two", b"\0three", b"\0four"])
file_values = st.tuples(contents, st.sampled_from([0o600, 0o644]))
trees = st.dictionaries(st.sampled_from(PATHS), file_values, max_size=9).map(without_clashes)
edits = st.dictionaries(
    st.sampled_from(PATHS), st.one_of(st.none(), file_values, st.just("mode")), max_size=5
)


def after(base: Files, changes: dict[bytes, object]) -> Files:
    files = dict(base)
    for path, change in changes.items():
        if change is None:
            files.pop(path, None)
        elif change == "mode":
            if path in files:
                files[path] = (files[path][0], files[path][1] ^ 0o111)
        else:
            files = {p: f for p, f in files.items() if not p.startswith(path + b"/")}
            for other in list(files):
                if path.startswith(other + b"/"):
                    del files[other]
            files[path] = change  # type: ignore[assignment]
    return without_clashes(files)


def merged_file(base: File | None, ours: File | None, theirs: File | None) -> File | str | None:
    """What the path must hold; "conflict" when that cannot be told."""
    if ours == theirs or theirs == base:
        return ours
    if ours == base:
        return theirs
    if ours is None or theirs is None:
        return "conflict"
    was = base or (None, None)
    merged = []
    for before, mine, other in zip(was, ours, theirs, strict=True):
        if mine != other and before not in (mine, other):
            return "conflict"
        merged.append(other if mine == before else mine)
    return (merged[0], merged[1])  # type: ignore[return-value]


def merge(
    objects: ObjectStore,
    writer: PackWriter,
    base: Entry | None,
    ours: Entry,
    theirs: Entry,
    **rules,
) -> MergedTree:
    bench = Bench(StoreLayout(str(Path(objects.dot_dir).parent)), writer)
    return merge_trees(writer, bench, MergeRules(renames=False, **rules), base, ours, theirs)


def near(path: bytes, others: set[bytes]) -> bool:
    return any(
        path == other or path.startswith(other + b"/") or other.startswith(path + b"/")
        for other in others
    )


@settings(max_examples=300, deadline=None)
@given(base=trees, mine=edits, other=edits)
def test_every_path_holds_what_the_model_says(objects, base, mine, other) -> None:
    ours, theirs = after(base, mine), after(base, other)
    with objects.writer() as writer:
        roots = [root_of(writer, files) for files in (base, ours, theirs)]
        result = merge(objects, writer, *roots)
        found = files_of(writer, result.root)
        conflicts = {conflict.path for conflict in result.conflicts}
        copies = {copy.path for conflict in result.conflicts for copy in conflict.copies}
        expected_conflicts = set()
        for path in base.keys() | ours.keys() | theirs.keys():
            expected = merged_file(base.get(path), ours.get(path), theirs.get(path))
            if expected == "conflict":
                expected_conflicts.add(path)
                assert near(path, conflicts), path
                if path in conflicts and path in ours:
                    # ours; but a field that theirs alone changed comes in
                    kept: tuple[object, ...] = ours[path]
                    if path in base and path in theirs:
                        fields = zip(base[path], ours[path], theirs[path], strict=True)
                        kept = tuple(o if b == m else m for b, m, o in fields)
                    assert found[path] == kept
            elif not near(path, conflicts):
                assert found.get(path) == expected, path
        for path in found.keys() - base.keys() - ours.keys() - theirs.keys():
            assert near(path, copies), path
        for conflict in result.conflicts:
            for copy in conflict.copies:
                side = {"base": base, "ours": ours, "theirs": theirs}[copy.side]
                if conflict.path in side:
                    assert found[copy.path] == side[conflict.path]
                else:
                    below = {
                        path[len(conflict.path) :]: file
                        for path, file in side.items()
                        if path.startswith(conflict.path + b"/")
                    }
                    assert below == {
                        path[len(copy.path) :]: file
                        for path, file in found.items()
                        if path.startswith(copy.path + b"/")
                    }
        turned = merge(objects, writer, roots[0], roots[2], roots[1])
        assert {conflict.path for conflict in turned.conflicts} == conflicts
        if not conflicts:
            assert files_of(writer, turned.root) == found
            assert not expected_conflicts


@settings(max_examples=150, deadline=None)
@given(base=trees, mine=edits, other=edits, favour=st.sampled_from(["ours", "theirs"]))
def test_a_favoured_side_leaves_nothing_open(objects, base, mine, other, favour) -> None:
    ours, theirs = after(base, mine), after(base, other)
    with objects.writer() as writer:
        roots = [root_of(writer, files) for files in (base, ours, theirs)]
        open_ones = {c.path for c in merge(objects, writer, *roots).conflicts}
        result = merge(objects, writer, *roots, policy=favour)
        assert result.conflicts == ()
        found = files_of(writer, result.root)
        chosen = ours if favour == "ours" else theirs
        for path in open_ones:
            versions = base.get(path), ours.get(path), theirs.get(path)
            if merged_file(*versions) != "conflict":
                continue
            was, mine_there, other_there = versions
            expected: tuple[object, ...] | None = chosen.get(path)
            if mine_there and other_there and was and expected:
                # field by field: what one side alone changed comes in all the same
                fields = zip(was, mine_there, other_there, expected, strict=True)
                expected = tuple(
                    o if b == m else m if b == o else decided for b, m, o, decided in fields
                )
            assert found.get(path) == expected, path


inodes = st.integers(0, 4)
linked_trees = st.dictionaries(st.sampled_from(PATHS[:4] + PATHS[9:]), inodes, max_size=6)
inode_contents = st.lists(file_values, min_size=5, max_size=5)


def linked_root(writer: PackWriter, names: dict[bytes, int], files: list[File]) -> Entry:
    links: dict[bytes, bytes] = {}
    for inode in set(names.values()):
        group = sorted(path for path, number in names.items() if number == inode)
        if len(group) > 1:
            links |= dict.fromkeys(group, group[0])
    return root_of(writer, {path: files[inode] for path, inode in names.items()}, links)


@settings(max_examples=300, deadline=None)
@given(
    versions=st.tuples(*[st.tuples(linked_trees, inode_contents)] * 3),
    policy=st.sampled_from(["beside", "ours", "theirs", "absent"]),
)
def test_a_hard_linked_file_is_one_file_after_any_merge(objects, versions, policy) -> None:
    with objects.writer() as writer:
        roots = [linked_root(writer, *version) for version in versions]
        result = merge(objects, writer, *roots, policy=policy)
        groups: dict[bytes, list[tuple[bytes, Entry]]] = {}
        for path, entry in walk_tree(writer, result.root):
            if entry.hardlink:
                groups.setdefault(entry.hardlink, []).append((path, entry))
        for first, members in groups.items():
            assert first == min(path for path, _ in members)
            assert len(members) > 1
            assert len({(e.content, e.size, e.mode, e.tree, e.mtime_ns) for _, e in members}) == 1
