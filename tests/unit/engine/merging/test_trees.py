"""Three-way merges of recorded trees: entries, renames, links, units, cost, virtual bases."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dmsync.core.graph import GraphView
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, XATTRS_MAX, Entry, EntryKind, Layout
from dmsync.core.pages import walk_tree
from dmsync.engine.merging.drivers import Bench, TextDriver
from dmsync.engine.merging.edits import write_entries
from dmsync.engine.merging.entries import merge_metadata
from dmsync.engine.merging.text import is_text, merge_texts
from dmsync.engine.merging.trees import MergedTree, MergeRules, merge_trees
from dmsync.engine.merging.virtual_base import virtual_base
from dmsync.storage.layout import Layout as StoreLayout
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_writer import PackWriter

Given = str | Entry
"""Content of a plain file, or an entry."""


class Trees:
    """Makes trees in a writer whose packs are never sealed."""

    def __init__(self, writer: PackWriter, home: Path) -> None:
        self.writer = writer
        self.bench = Bench(StoreLayout(str(home)), writer)

    def file(self, content: str, **fields: object) -> Entry:
        data = content.encode()
        chunk = self.writer.put(Kind.CHUNK, data)
        return replace(
            Entry(b"x", EntryKind.FILE, 0o644, 1, 1, 5, len(data), chunk, Layout.SINGLE),
            **fields,  # type: ignore[arg-type]
        )

    def tree(self, files: Mapping[str, Given]) -> Entry:
        directories: dict[bytes, dict[bytes, Entry]] = {b"": {}}
        for text, given in files.items():
            above, _, name = text.encode().rpartition(b"/")
            entry = self.file(given) if isinstance(given, str) else given
            directories.setdefault(above, {})[name] = entry.renamed(name)
            while above not in directories or above:
                above = above.rpartition(b"/")[0]
                directories.setdefault(above, {})
        for path in sorted(directories, key=lambda path: -path.count(b"/") if path else 1):
            page = write_entries(self.writer, None, directories[path])
            if not path:
                return replace(ROOT_ENTRY, tree=page)
            above, _, name = path.rpartition(b"/")
            directories[above][name] = Entry(name, EntryKind.DIRECTORY, 0o755, tree=page)
        raise AssertionError("the root comes last")

    def merge(
        self,
        base: Mapping[str, Given] | None,
        ours: Mapping[str, Given],
        theirs: Mapping[str, Given],
        **rules: object,
    ) -> MergedTree:
        return merge_trees(
            self.writer,
            self.bench,
            MergeRules(**rules),  # type: ignore[arg-type]
            None if base is None else self.tree(base),
            self.tree(ours),
            self.tree(theirs),
        )

    def entries(self, merged: MergedTree) -> dict[str, Entry]:
        return {path.decode(): entry for path, entry in walk_tree(self.writer, merged.root)}

    def files(self, merged: MergedTree) -> dict[str, str]:
        return {
            path: self.bench.read(entry).decode()
            for path, entry in self.entries(merged).items()
            if entry.kind is EntryKind.FILE
        }


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Trees]:
    with ObjectStore(str(tmp_path / ("ab" * 16))) as objects, objects.writer() as writer:
        made = Trees(writer, tmp_path / "home")
        (tmp_path / "home").mkdir()
        yield made
        made.bench.close()


def paths(merged: MergedTree) -> list[str]:
    return [conflict.path.decode() for conflict in merged.conflicts]


# --- fields -------------------------------------------------------------------------------------


def test_fields_of_one_entry_merge_one_by_one(trees: Trees) -> None:
    base = trees.file("x", xattrs=((b"user.a", b"1"), (b"user.b", b"1")))
    ours = replace(base, mode=0o600, mtime_ns=7, xattrs=((b"user.a", b"2"), (b"user.b", b"1")))
    theirs = replace(base, uid=9, gid=8, mtime_ns=6, xattrs=((b"user.a", b"1"), (b"user.c", b"3")))
    merged, clashes = merge_metadata(base, ours, theirs, ours)
    assert clashes == ()
    assert (merged.mode, merged.uid, merged.gid, merged.mtime_ns) == (0o600, 9, 8, 7)
    assert merged.xattrs == ((b"user.a", b"2"), (b"user.c", b"3"))


def test_a_time_that_one_side_set_back_stays_set_back(trees: Trees) -> None:
    base = trees.file("x", mtime_ns=100)
    merged, _ = merge_metadata(base, replace(base, mtime_ns=50), base, base)
    assert merged.mtime_ns == 50


def test_fields_changed_differently_keep_ours_or_the_favoured_side(trees: Trees) -> None:
    base = trees.file("x", xattrs=((b"user.a", b"1"),))
    ours = replace(base, mode=0o600, xattrs=((b"user.a", b"2"),))
    theirs = replace(base, mode=0o640, xattrs=())
    merged, clashes = merge_metadata(base, ours, theirs, ours)
    assert (merged.mode, merged.xattrs, clashes) == (0o600, ours.xattrs, ("mode", "attributes"))
    merged, clashes = merge_metadata(base, ours, theirs, ours, "theirs")
    assert (merged.mode, merged.xattrs, clashes) == (0o640, (), ())


def test_attributes_that_are_too_many_together_conflict(trees: Trees) -> None:
    half = XATTRS_MAX // 2 + 1
    ours = trees.file("x", xattrs=tuple((b"user.a%03d" % n, b"") for n in range(half)))
    theirs = trees.file("x", xattrs=tuple((b"user.b%03d" % n, b"") for n in range(half)))
    assert merge_metadata(trees.file("x"), ours, theirs, ours)[1] == ("attributes",)


def test_content_of_one_side_goes_with_the_mode_of_the_other(trees: Trees) -> None:
    merged = trees.merge({"f": "1"}, {"f": "2"}, {"f": trees.file("1", mode=0o755)})
    assert (trees.files(merged), trees.entries(merged)["f"].mode) == ({"f": "2"}, 0o755)
    assert merged.conflicts == ()


def test_links_and_devices_are_whole_values(trees: Trees) -> None:
    def link(target: bytes) -> Entry:
        return Entry(b"x", EntryKind.SYMLINK, 0o777, link_target=target)

    def device(minor: int) -> Entry:
        return Entry(b"x", EntryKind.BLOCK_DEVICE, 0o600, device=(8, minor))

    merged = trees.merge(
        {"l": link(b"1"), "m": link(b"1"), "d": device(1)},
        {"l": link(b"2"), "m": link(b"2"), "d": device(2)},
        {"l": link(b"3"), "m": link(b"1"), "d": device(3)},
    )
    assert paths(merged) == ["d", "l"]
    assert trees.entries(merged)["m"].link_target == b"2"
    assert trees.entries(merged)["l~theirs"].link_target == b"3"
    assert trees.entries(merged)["d~base"].device == (8, 1)


def test_mode_conflicts_of_directories_lay_no_content_beside(trees: Trees) -> None:
    def directory(mode: int) -> Entry:
        return replace(trees.tree({"f": "x"}), mode=mode)

    merged = trees.merge(
        {"s/d": directory(0o755)}, {"s/d": directory(0o700)}, {"s/d": directory(0o750)}
    )
    assert [(c.path, c.scope) for c in merged.conflicts] == [(b"s/d", "metadata")]
    assert trees.files(merged) == {"s/d/f": "x"}
    assert trees.entries(merged)["s/d~theirs"].mode == 0o750


# --- renames ------------------------------------------------------------------------------------


def test_a_change_follows_a_file_that_the_other_side_moved(trees: Trees) -> None:
    merged = trees.merge(
        {"d/old": "content", "x": "1"},
        {"new/place/name": "content", "x": "1"},
        {"d/old": "content and more", "x": "2"},
    )
    assert merged.conflicts == ()
    assert trees.files(merged) == {"new/place/name": "content and more", "x": "2"}
    turned = trees.merge(
        {"d/old": "content", "x": "1"},
        {"d/old": "content and more", "x": "2"},
        {"new/place/name": "content", "x": "1"},
    )
    assert trees.files(turned) == trees.files(merged)


def test_moves_by_both_sides_are_followed_both(trees: Trees) -> None:
    merged = trees.merge(
        {"a": "one", "b": "two"}, {"c": "one", "b": "two!"}, {"a": "one!", "d": "two"}
    )
    assert (paths(merged), trees.files(merged)) == ([], {"c": "one!", "d": "two!"})


def test_a_move_to_a_taken_name_is_not_followed(trees: Trees) -> None:
    merged = trees.merge({"a": "one"}, {"b": "one"}, {"a": "one!", "b": "mine"})
    assert paths(merged) == ["a", "b"]
    files = trees.files(merged)
    assert (files["a~theirs"], files["b"], files["b~theirs"]) == ("one!", "one", "mine")


@pytest.mark.parametrize(
    ("base", "ours"),
    [
        ({"a": "same", "b": "same"}, {"c": "same", "d": "same"}),
        ({"a": "same", "b": "same"}, {"c": "same"}),
        ({"a": "same"}, {"c": "same", "d": "same"}),
        ({"a": "same", "x/b": "same"}, {"x/a": "same", "c": "same"}),
    ],
)
def test_a_move_among_identical_files_is_not_guessed(trees: Trees, base, ours) -> None:
    for edited in base:
        merged = trees.merge(base, ours, {**base, edited: "same, and an edit"})
        assert paths(merged) == [edited]
        files = trees.files(merged)
        assert files[f"{edited}~theirs"] == "same, and an edit"
        assert {name: files[name] for name in ours} == ours
        turned = trees.merge(base, {**base, edited: "same, and an edit"}, ours)
        assert paths(turned) == [edited]
        assert trees.files(turned)[edited] == "same, and an edit"


@pytest.mark.parametrize(
    ("base", "ours", "theirs"),
    [
        ({"db": "m", "db-wal": "w"}, {"new": "m"}, {"db": "m!", "db-wal": "w!"}),
        ({"p/ibdata1": "i", "p/t": "one"}, {"p/ibdata1": "i", "t": "one"},
         {"p/ibdata1": "i", "p/t": "one!"}),
    ],
)  # fmt: skip
def test_nothing_is_moved_out_of_a_database(trees: Trees, base, ours, theirs) -> None:
    merged = trees.merge(base, ours, theirs)
    assert len(merged.conflicts) == 1


# --- hard links ---------------------------------------------------------------------------------


def linked(trees: Trees, content: str, *names: str, **fields: object) -> dict[str, Entry]:
    first = min(names).encode()
    return {name: trees.file(content, hardlink=first, **fields) for name in names}


def test_a_linked_file_changed_on_both_sides_is_one_conflict(trees: Trees) -> None:
    merged = trees.merge(
        linked(trees, "\0 1", "a", "d/b", "z"),
        linked(trees, "\0 2", "a", "d/b", "z"),
        linked(trees, "\0 3", "a", "d/b", "z"),
    )
    assert paths(merged) == ["a"]
    assert merged.conflicts[0].also == (b"d/b", b"z")
    entries = trees.entries(merged)
    assert {entries[name].hardlink for name in ("a", "d/b", "z")} == {b"a"}
    assert entries["a~theirs"].hardlink == b""
    assert "d/b~theirs" not in entries


def test_a_linked_text_merges_as_one_file(trees: Trees) -> None:
    text = "".join(f"{number}\n" for number in range(20))
    merged = trees.merge(
        linked(trees, text, "a", "b"),
        linked(trees, text.replace("3\n", "ours\n", 1), "a", "b"),
        linked(trees, text + "end\n", "a", "b"),
        drivers=(TextDriver(),),
    )
    entries = trees.entries(merged)
    assert entries["a"].content == entries["b"].content
    assert (entries["a"].hardlink, merged.conflicts) == (b"a", ())
    assert trees.files(merged)["b"] == text.replace("3\n", "ours\n", 1) + "end\n"


def test_a_new_name_of_a_file_that_the_other_side_changed_stands_alone(trees: Trees) -> None:
    """What one side linked and the other wrote: content goes first, links follow it."""
    base = linked(trees, "1", "d1/a", "d2/b")
    ours = linked(trees, "2", "d1/a", "d2/b")
    theirs = linked(trees, "1", "d1/a", "d2/b", "d3/c")
    merged = trees.merge(base, ours, theirs)
    entries = trees.entries(merged)
    assert trees.files(merged) == {"d1/a": "2", "d2/b": "2", "d3/c": "1"}
    assert [entries[p].hardlink for p in ("d1/a", "d2/b", "d3/c")] == [b"d1/a", b"d1/a", b""]


def test_a_group_whose_first_name_went_is_named_by_the_next(trees: Trees) -> None:
    base = linked(trees, "1", "a", "b", "c")
    merged = trees.merge(
        {**base, "x": "1"}, {**linked(trees, "1", "b", "c"), "x": "1"}, {**base, "x": "2"}
    )
    entries = trees.entries(merged)
    assert [entries[name].hardlink for name in ("b", "c")] == [b"b", b"b"]


def test_links_inside_a_copied_database_stay_inside(trees: Trees) -> None:
    def database(content: str) -> dict[str, Given]:
        return {"s/db/ibdata1": content, **linked(trees, "same", "s/db/one", "s/db/two")}

    merged = trees.merge(database("1"), database("2"), database("3"))
    entries = trees.entries(merged)
    assert entries["s/db/two"].hardlink == b"s/db/one"
    assert entries["s/db~theirs/two"].hardlink == b"s/db~theirs/one"


# --- places for copies --------------------------------------------------------------------------


def test_a_name_without_room_for_an_ending_has_no_copies(trees: Trees) -> None:
    name = "n" * 252
    merged = trees.merge({name: "1"}, {name: "2"}, {name: "3"})
    assert (paths(merged), merged.conflicts[0].copies) == ([name], ())
    assert trees.files(merged) == {name: "2"}


def test_a_subdot_has_no_copies_beside_it_not_even_some(trees: Trees) -> None:
    merged = trees.merge({"d/a": "1"}, {"d": "now a file"}, {})
    assert (paths(merged), merged.conflicts[0].copies) == (["d"], ())
    assert trees.files(merged) == {"d": "now a file"}


def test_nothing_of_a_directory_that_one_side_deleted_is_lost(trees: Trees) -> None:
    merged = trees.merge(
        {"d/kept": "1", "d/changed": "1", "x": "1"},
        {"x": "1"},
        {"d/kept": "1", "d/changed": "2", "d/added": "3", "x": "1"},
    )
    assert paths(merged) == ["d/changed"]
    assert trees.files(merged) == {
        "d/added": "3",
        "d/changed~base": "1",
        "d/changed~theirs": "2",
        "x": "1",
    }


def test_deep_trees_do_not_exhaust_the_stack(trees: Trees) -> None:
    deep = "/".join(["d"] * 1500)
    merged = trees.merge(
        {f"{deep}/a": "1", f"{deep}/b": "1"},
        {f"{deep}/a": "2", f"{deep}/b": "1"},
        {f"{deep}/a": "1", f"{deep}/b": "2"},
    )
    assert trees.files(merged) == {f"{deep}/a": "2", f"{deep}/b": "2"}


# --- cost ---------------------------------------------------------------------------------------


def test_an_unchanged_directory_is_never_read(trees: Trees, monkeypatch) -> None:
    writer = trees.writer
    many = {b"n%05d" % n: trees.file("x").renamed(b"n%05d" % n) for n in range(20_000)}
    tree = write_entries(writer, None, many)
    big = Entry(b"big", EntryKind.DIRECTORY, 0o755, tree=tree)
    base: dict[str, Given] = {"big": big, "d/a": "1", "d/b": "1"}
    roots = [
        trees.tree(base),
        trees.tree({**base, "d/a": "2"}),
        trees.tree({**base, "d/b": "2"}),
    ]
    read: list[ObjectId] = []
    original = PackWriter.read

    def noted(self: PackWriter, kind: Kind, oid: ObjectId) -> bytes:
        read.append(oid)
        return original(self, kind, oid)

    monkeypatch.setattr(PackWriter, "read", noted)
    merged = merge_trees(writer, trees.bench, MergeRules(), *roots)
    assert tree not in read and len(read) < 100
    assert trees.entries(merged)["d/b"].size == 1


# --- texts --------------------------------------------------------------------------------------


def test_hunks_merge_whichever_side_is_ours() -> None:
    base = b"".join(b"%d\n" % n for n in range(50))
    ours = base.replace(b"10\n", b"ten\n").replace(b"40\n", b"")
    theirs = b"zero\n" + base.replace(b"25\n", b"25\n25b\n") + b"last without newline"
    merged = merge_texts(base, ours, theirs)
    assert merged.conflicts == 0
    assert merged == merge_texts(base, theirs, ours)
    assert merged.data == (
        b"zero\n"
        + base.replace(b"10\n", b"ten\n").replace(b"40\n", b"").replace(b"25\n", b"25\n25b\n")
        + b"last without newline"
    )


def test_a_line_without_an_end_does_not_swallow_its_marker() -> None:
    merged = merge_texts(b"a", b"b", b"c")
    assert merged.conflicts == 1
    assert merged.data == (b"<<<<<<< ours\nb\n||||||| base\na\n=======\nc\n>>>>>>> theirs\n")
    assert merge_texts(b"a", b"b", b"c", "theirs").data == b"c"


@pytest.mark.parametrize("data", [b"\0", b"a\xff", b"\xc3"])
def test_what_is_no_text_is_not_merged_as_one(data: bytes) -> None:
    assert not is_text(data)


# --- virtual bases ------------------------------------------------------------------------------


class Graph:
    """Commits by number, with parents."""

    def __init__(self, parents: dict[int, tuple[int, ...]]) -> None:
        self._parents = {oid(n): tuple(map(oid, p)) for n, p in parents.items()}
        self.asked = 0

    def has(self, commit: ObjectId) -> bool:
        return commit in self._parents

    def parents(self, commit: ObjectId) -> tuple[ObjectId, ...]:
        self.asked += 1
        return self._parents[commit]

    def generation(self, commit: ObjectId) -> int:
        return commit[30] * 256 + commit[31]  # numbers ascend from parents to children

    def first_parent_depth(self, commit: ObjectId) -> int:
        found = self._parents[commit]
        return 0 if not found else 1 + self.first_parent_depth(found[0])

    def jump(self, commit: ObjectId) -> ObjectId:
        found = self._parents[commit]
        return found[0] if found else commit


def oid(number: int) -> ObjectId:
    return ObjectId(number.to_bytes(32, "big"))


def test_a_ladder_of_criss_crosses_is_walked_once() -> None:
    parents: dict[int, tuple[int, ...]] = {1: (), 2: (1,), 3: (1,)}
    for level in range(1, 33):
        left, right = 2 * level, 2 * level + 1
        parents[left + 2], parents[right + 2] = (left, right), (right, left)
    graph: GraphView = Graph(parents)
    merges = []

    def merge(base: Entry | None, ours: Entry, theirs: Entry) -> Entry:
        merges.append((base, ours, theirs))
        return replace(ROOT_ENTRY, mtime_ns=len(merges))

    found = virtual_base(graph, (oid(66), oid(67)), lambda c: replace(ROOT_ENTRY, uid=c[31]), merge)
    assert len(merges) == 33  # once a level, and the pair itself
    assert found == replace(ROOT_ENTRY, mtime_ns=33)
    assert merges[0][0] == replace(ROOT_ENTRY, uid=1)


def test_what_conflicts_in_a_virtual_base_is_absent_from_it(trees: Trees) -> None:
    merged = trees.merge(
        {"f": "1", "g": "1"}, {"f": "2", "g": "2"}, {"f": "3", "g": "1"}, policy="absent"
    )
    assert (trees.files(merged), merged.conflicts) == ({"g": "2"}, ())
    again = merge_trees(
        trees.writer,
        trees.bench,
        MergeRules(),
        merged.root,
        trees.tree({"f": "2", "g": "2"}),
        trees.tree({"f": "3", "g": "2"}),
    )
    assert [(c.path, c.reason) for c in again.conflicts] == [(b"f", "added on both sides")]


@pytest.mark.parametrize("path", ["f", "d/f", "app.db", "d/deep/app.db"])
@pytest.mark.parametrize("companion", ["", "-wal"])
def test_what_the_bases_disagree_on_and_one_side_deleted_conflicts(
    trees: Trees, path: str, companion: str
) -> None:
    def version(content: str) -> dict[str, Given]:
        files = {"other": "1", path: content}
        return files | {path + companion: content} if companion else files

    base = trees.merge(version("1"), version("2"), version("3"), policy="absent")
    assert base.undecided == {path.encode()}
    left = version("2")
    deleted = {"other": "1"}
    for ours, theirs in ((deleted, left), (left, deleted)):
        merged = merge_trees(
            trees.writer,
            trees.bench,
            MergeRules(undecided=base.undecided),
            base.root,
            trees.tree(ours),
            trees.tree(theirs),
        )
        (conflict,) = merged.conflicts
        assert path.encode().startswith(conflict.path)
        side = "ours" if ours is deleted else "theirs"
        assert conflict.reason.startswith(f"deleted by {side}")


def test_a_side_like_the_virtual_base_has_deleted_what_that_lacks(trees: Trees) -> None:
    base = trees.merge(
        {"d/f": "1", "d/x": "1"}, {"d/f": "2", "d/x": "1"}, {"d/f": "3", "d/x": "1"},
        policy="absent",
    )  # fmt: skip
    rules = MergeRules(undecided=base.undecided)
    ours = trees.tree({"d/f": "2", "d/x": "1"})
    for pair in ((ours, base.root), (base.root, ours)):
        merged = merge_trees(trees.writer, trees.bench, rules, base.root, *pair)
        assert paths(merged) == ["d/f"]
