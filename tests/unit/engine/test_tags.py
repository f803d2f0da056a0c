"""Tags and their signatures: in one store, and between two."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dmsync.core.events import RefChanged, SignatureAdded
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.core.objects import ROOT_ENTRY, Commit, Tag, signed_message
from dmsync.engine import sync_opening
from dmsync.engine.allowed_signers import read_allowed_signers
from dmsync.engine.commit_info import CommitReader
from dmsync.engine.fsck import fsck
from dmsync.engine.revision_lookup import resolve_revision
from dmsync.engine.signatures import SigningKey, Standing, judge
from dmsync.engine.tagging import TagRequest, create_tag, delete_tags, list_tags
from dmsync.engine.tags import peel, read_tag
from dmsync.errors import (
    AlreadyExists,
    BadObject,
    InvalidName,
    ObjectMissing,
    ProtocolError,
    RevisionNotFound,
    SigningFailed,
    UsageError,
)
from dmsync.storage.catalog import DotRow, RefRow
from dmsync.wire import limits, messages
from dmsync.wire.messages import RefStatus, RefValue, Signatures, is_ref_name
from tests.support.signers import Signer, make_signer, sign_stock
from tests.support.sync_stores import FakeStore, Pair
from tests.support.working_store import Workshop

ARMOUR = b"-----BEGIN SSH SIGNATURE-----\n"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    shop = Workshop(tmp_path / "home")
    yield shop
    shop.close()


@pytest.fixture
def dot(shop: Workshop, tmp_path: Path) -> DotRow:
    dot = shop.attach("app", tmp_path / "tree")
    for name in ("one", "two"):
        (tmp_path / "tree" / name).write_text(name)
        shop.commit(dot, name)
    return dot


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return make_signer(tmp_path, "key")


# --- in one store ----------------------------------------------------------------------------------


def test_a_light_tag_is_the_commit_and_an_annotated_one_leads_to_it(
    shop: Workshop, dot: DotRow
) -> None:
    first = resolve_revision(shop.store, dot, "HEAD~1")
    light = create_tag(shop.store, dot, TagRequest("v0.9", "HEAD~1"))
    annotated = create_tag(shop.store, dot, TagRequest("v1.0", "v0.9", message="the\nfirst"))
    assert light.target == light.commit == annotated.commit == first
    assert annotated.target not in (None, first)
    assert resolve_revision(shop.store, dot, "v1.0") == first
    assert resolve_revision(shop.store, dot, "tag/v1.0") == first
    with pytest.raises(RevisionNotFound):
        resolve_revision(shop.store, dot, "v1.0~1")
    tag = read_tag(shop.store, dot.dot, ObjectId(annotated.target or b""))
    assert (tag.name, tag.message, tag.target) == ("v1.0", "the\nfirst", first)
    assert tag.tagger == shop.settings.author and abs(tag.time_ns - time.time_ns()) < 60e9
    assert CommitReader(shop.store, dot.dot).info(first).refs == ("tag/v0.9", "tag/v1.0")
    assert fsck(shop.store, full=True).problems == []


def test_tags_are_listed_by_pattern_and_by_what_they_contain(shop: Workshop, dot: DotRow) -> None:
    for name, revision in (("v1.0", "HEAD~1"), ("v1.1", "HEAD"), ("x", "HEAD")):
        create_tag(shop.store, dot, TagRequest(name, revision, message=name))

    def names(patterns: Sequence[str] = (), contains: str | None = None) -> list[str]:
        return [info.name for info in list_tags(shop.store, dot, patterns, contains)]

    assert names() == ["v1.0", "v1.1", "x"]
    assert names(["v1.*"]) == ["v1.0", "v1.1"]
    assert names(["v1.?", "x"], "HEAD") == ["v1.1", "x"]
    assert names([], "v1.0") == ["v1.0", "v1.1", "x"]


def test_a_tag_moves_by_force_only_and_can_be_deleted(shop: Workshop, dot: DotRow) -> None:
    made = create_tag(shop.store, dot, TagRequest("v", "HEAD~1", message="m"))
    before = shop.store.catalog.last_seq()
    with pytest.raises(AlreadyExists):
        create_tag(shop.store, dot, TagRequest("v"))
    dry = create_tag(shop.store, dot, TagRequest("v", force=True, dry_run=True))
    assert dry.old == made.target and shop.store.catalog.last_seq() == before
    moved = create_tag(shop.store, dot, TagRequest("v", force=True))
    assert (moved.old, moved.target) == (made.target, moved.commit)
    assert resolve_revision(shop.store, dot, "v@{1}") == made.commit
    with pytest.raises(RevisionNotFound):
        delete_tags(shop.store, dot, ["v", "none"])
    assert [info.name for info in delete_tags(shop.store, dot, ["v", "v"])] == ["v"]
    assert list_tags(shop.store, dot) == []
    with pytest.raises(RevisionNotFound):
        resolve_revision(shop.store, dot, "v")


@pytest.mark.parametrize("name", ["a/b", "a..b", "v.", "-x", "", "HEAD", "deadbeef", "ä", "x" * 65])
def test_names_that_are_none(shop: Workshop, dot: DotRow, name: str) -> None:
    with pytest.raises(InvalidName):
        create_tag(shop.store, dot, TagRequest(name, message="m"))


@pytest.mark.parametrize("message", ["", " \n", "x" * (1024 * 1024 + 1)])
def test_messages_that_are_none(shop: Workshop, dot: DotRow, message: str) -> None:
    with pytest.raises(UsageError):
        create_tag(shop.store, dot, TagRequest("v", message=message))


def test_signed_commits_and_tags_survive_the_catalog(
    shop: Workshop, dot: DotRow, signer: Signer, tmp_path: Path
) -> None:
    """P3: tags and signatures are in the log and in the packs; the catalog adds nothing."""
    key = SigningKey(str(signer.path))
    unsigned = shop.commit(dot, "plain").commit
    signed = shop.commit(dot, "signed", signing=key).commit
    made = create_tag(shop.store, dot, TagRequest("v", message="m", signing=key))
    assert made.target is not None and signed is not None and unsigned is not None
    for path in Path(shop.store.home).glob("catalog.sqlite*"):
        path.unlink()
    shop.reopen()
    (tmp_path / "allowed").write_text(f"ada@example.org {signer.public}\n")
    allowed = read_allowed_signers(str(tmp_path / "allowed"))

    def look(kind: Kind, oid: ObjectId) -> tuple[Standing, str]:
        verdict = judge(shop.store, dot.dot, kind, oid, allowed, time.time())
        return verdict.standing, verdict.principal

    assert look(Kind.COMMIT, signed) == (Standing.GOOD, "ada@example.org")
    assert look(Kind.TAG, made.target) == (Standing.GOOD, "ada@example.org")
    assert look(Kind.COMMIT, unsigned) == (Standing.NONE, "")
    assert peel(shop.store, dot.dot, made.target) == signed
    assert fsck(shop.store, full=True).problems == []


def test_one_good_signature_counts_among_others(
    shop: Workshop, dot: DotRow, signer: Signer, tmp_path: Path
) -> None:
    commit = shop.commit(dot, "m").commit
    assert commit is not None
    message = signed_message(Kind.COMMIT, commit)
    (tmp_path / "allowed").write_text(f"ada {signer.public}\n")
    allowed = read_allowed_signers(str(tmp_path / "allowed"))
    stranger = sign_stock(make_signer(tmp_path, "stranger"), message)
    expected = (Standing.BAD, Standing.UNKNOWN, Standing.GOOD)
    for armour, standing in zip(
        (b"junk", stranger, sign_stock(signer, message)), expected, strict=True
    ):
        with shop.store.transaction("test") as tx:
            tx.append(SignatureAdded(dot.dot, commit, armour))
        verdict = judge(shop.store, dot.dot, Kind.COMMIT, commit, allowed, time.time())
        assert verdict.standing is standing


def test_a_signature_that_cannot_be_made_leaves_nothing(
    shop: Workshop, dot: DotRow, tmp_path: Path
) -> None:
    locked = make_signer(tmp_path, "locked", passphrase="secret words")
    before = shop.store.catalog.last_seq()
    packs = shop.store.objects(dot.dot).stored_bytes()
    for make in (
        lambda key: create_tag(shop.store, dot, TagRequest("v", message="m", signing=key)),
        lambda key: shop.commit(dot, "m", signing=key),
    ):
        with pytest.raises(SigningFailed):
            make(SigningKey(str(locked.path)))
    assert shop.store.catalog.last_seq() == before
    assert shop.store.objects(dot.dot).stored_bytes() == packs


def put_tag(store: FakeStore | Workshop, dot: DotId, tag: Tag) -> ObjectId:
    objects = store.store.objects(dot) if isinstance(store, Workshop) else store.objects(dot)
    with objects.writer() as writer:
        oid = writer.put(Kind.TAG, tag.to_bytes())
        writer.seal()
    return oid


def test_no_ref_can_name_a_bad_tag_object(shop: Workshop, dot: DotRow) -> None:
    head = resolve_revision(shop.store, dot, "HEAD")
    good = put_tag(shop, dot.dot, Tag(head, "v", "a", 0, 0, "m"))
    dangling = put_tag(shop, dot.dot, Tag(ObjectId(bytes(32)), "v", "a", 0, 0, "m"))
    chain = put_tag(shop, dot.dot, Tag(good, "v", "a", 0, 0, "m"))
    nowhere = object_id(Kind.TAG, b"never stored")
    cases = (
        ("tag/other", good, BadObject),
        ("branch/v", good, ObjectMissing),
        ("tag/v", dangling, ObjectMissing),
        ("tag/v", chain, ObjectMissing),
        ("tag/v", nowhere, ObjectMissing),
    )
    for name, oid, error in cases:
        with pytest.raises(error), shop.store.transaction("test") as tx:
            tx.append(RefChanged(dot.dot, name, None, oid, "tag"))
    assert list_tags(shop.store, dot) == []


def test_fsck_names_a_tag_whose_object_is_gone(shop: Workshop, dot: DotRow) -> None:
    before = {pack.name for pack in shop.store.objects(dot.dot).packs()}
    create_tag(shop.store, dot, TagRequest("v", message="m"))
    (pack,) = {pack.name for pack in shop.store.objects(dot.dot).packs()} - before
    directory = Path(shop.store.objects(dot.dot).dot_dir)
    (directory / "packs" / pack).unlink()
    shop.reopen()
    assert "tag/v" in [problem.where for problem in fsck(shop.store, full=False).problems]
    assert resolve_revision(shop.store, dot, "HEAD")  # and nothing else is hurt


# --- between two stores ------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(str(tmp_path))
    yield pair
    pair.close()


def annotate(store: FakeStore, dot: DotId, name: str, commit: ObjectId) -> ObjectId:
    oid = put_tag(store, dot, Tag(commit, name, "a", 1, 0, "m"))
    store.append(
        RefChanged(dot, f"tag/{name}", store.ref(dot, f"tag/{name}"), oid, "tag"),
        SignatureAdded(dot, oid, ARMOUR + name.encode()),
    )
    return oid


def sign_commit(store: FakeStore, dot: DotId, commit: ObjectId, text: bytes = b"c") -> None:
    store.append(SignatureAdded(dot, commit, ARMOUR + text))


def pushed(pair: Pair) -> tuple[DotId, list[ObjectId], ObjectId]:
    """A dot with two commits, a tag and signatures, pushed with its tags."""
    dot = pair.local.create_dot()
    commits = [pair.local.commit(dot, {"a": b"1"}), pair.local.commit(dot, {"a": b"2"})]
    tag = annotate(pair.local, dot, "v1", commits[0])
    pair.local.append(RefChanged(dot, "tag/light", None, commits[1], "tag"))
    sign_commit(pair.local, dot, commits[1])
    summary = pair.push(dot, tags=True)
    assert {ref.ref for ref in summary.refs} == {"branch/master", "tag/v1", "tag/light"}
    return dot, commits, tag


def test_tags_and_signatures_travel_with_a_push_and_then_there_is_nothing_to_do(pair: Pair) -> None:
    dot, commits, tag = pushed(pair)
    assert pair.remote.ref(dot, "tag/v1") == tag
    assert pair.remote.ref(dot, "tag/light") == commits[1]
    assert pair.remote.catalog.signatures(dot, tag) == [ARMOUR + b"v1"]
    assert pair.remote.catalog.signatures(dot, commits[1]) == [ARMOUR + b"c"]
    again = pair.push(dot, tags=True)
    assert again.nothing_to_do and again.round_trips == 1


def test_a_push_of_a_tag_alone_is_a_usual_push(pair: Pair) -> None:
    dot, commits, _ = pushed(pair)
    tag = annotate(pair.local, dot, "v2", commits[1])
    summary = pair.push(dot, tags=True)
    assert (summary.objects_sent, summary.round_trips) == (1, 2)
    assert pair.remote.ref(dot, "tag/v2") == tag
    assert pair.remote.catalog.signatures(dot, tag) == [ARMOUR + b"v2"]


def test_without_tags_a_push_leaves_them_out(pair: Pair) -> None:
    dot = pair.local.create_dot()
    annotate(pair.local, dot, "v1", pair.local.commit(dot, {"a": b"1"}))
    pair.push(dot)
    assert pair.remote.ref(dot, "tag/v1") is None


def test_a_tag_that_is_there_already_is_refused_and_stays(pair: Pair) -> None:
    dot, commits, tag = pushed(pair)
    annotate(pair.local, dot, "v1", commits[1])
    outcome = pair.try_push(dot, tags=True)
    assert isinstance(outcome.error, AlreadyExists)
    assert pair.remote.ref(dot, "tag/v1") == tag


def test_a_clone_brings_tags_and_signatures(pair: Pair, tmp_path: Path) -> None:
    dot, commits, tag = pushed(pair)
    pair.local.close()
    pair.local = FakeStore(str(tmp_path / "fresh"))
    pair.local.add_remote()
    summary = pair.clone()
    assert summary.round_trips == 2
    assert pair.local.ref(dot, "tag/v1") == tag and pair.local.ref(dot, "tag/light") == commits[1]
    assert pair.local.catalog.signatures(dot, tag) == [ARMOUR + b"v1"]
    assert pair.local.catalog.signatures(dot, commits[1]) == [ARMOUR + b"c"]
    again = pair.fetch(dot)
    assert again.nothing_to_do and again.round_trips == 1


def test_a_pull_of_one_branch_brings_the_tags_within_it(pair: Pair) -> None:
    dot, commits, _ = pushed(pair)
    inside = pair.remote.commit(dot, {"a": b"3"})
    pair.remote.branch(dot, "aside", inside)
    outside = pair.remote.commit(dot, {"a": b"4"}, "aside")
    wanted = annotate(pair.remote, dot, "in", inside)
    annotate(pair.remote, dot, "out", outside)
    pair.remote.append(RefChanged(dot, "tag/out-light", None, outside, "tag"))
    old = annotate(pair.remote, dot, "of-old", commits[0])
    summary = pair.pull(dot, branches=("master",))
    assert pair.local.tip(dot) == inside
    assert pair.local.ref(dot, "tag/in") == wanted and pair.local.ref(dot, "tag/of-old") == old
    assert pair.local.ref(dot, "tag/out") is None and pair.local.ref(dot, "tag/out-light") is None
    assert summary.objects_received == 3 + 2  # chunk, page, commit and two tags
    assert pair.pull(dot, branches=("master",)).round_trips == 1
    assert pair.fetch(dot).commits_received == 1
    assert pair.local.ref(dot, "tag/out") is not None
    assert pair.local.ref(dot, "tag/out-light") == outside


def test_a_tag_alone_is_fetched_when_its_commit_is_here(pair: Pair) -> None:
    dot, commits, _ = pushed(pair)
    tag = annotate(pair.remote, dot, "late", commits[0])
    summary = pair.pull(dot, branches=("master",))
    assert (summary.objects_received, summary.commits_received) == (1, 0)
    assert pair.local.ref(dot, "tag/late") == tag
    assert pair.local.catalog.signatures(dot, tag) == [ARMOUR + b"late"]


def test_a_retagged_remote_tag_is_told_and_taken_by_force_only(pair: Pair) -> None:
    dot, commits, tag = pushed(pair)
    other = annotate(pair.remote, dot, "v1", commits[1])
    summary = pair.pull(dot, branches=("master",))
    assert summary.tags_kept == ("v1",) and pair.local.ref(dot, "tag/v1") == tag
    summary = pair.pull(dot, branches=("master",), move="force")
    assert summary.tags_kept == () and pair.local.ref(dot, "tag/v1") == other
    assert RefStatus.FORCED in {ref.status for ref in summary.refs}


@pytest.mark.parametrize("is_old", ["client", "server"])
def test_a_peer_that_knows_no_tags_is_sent_none(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, is_old: str
) -> None:
    """Both sides speak through one process here: what each believes of the other is replaced."""
    dot, commits, _ = pushed(pair)
    annotate(pair.local, dot, "mine", commits[1])
    annotate(pair.remote, dot, "theirs", commits[1])
    new = pair.local.commit(dot, {"a": b"9"})
    sign_commit(pair.local, dot, new)
    for module in ("sync_push", "sync_server"):
        monkeypatch.setattr(f"dmsync.engine.{module}.knows_tags", lambda peer: False)
    if is_old == "client":
        summary = pair.fetch(dot)
        assert not summary.tags_kept and pair.local.ref(dot, "tag/theirs") is None
    else:
        pushing = pair.push(dot, tags=True)
        assert set(pushing.tags_left_out) == {"mine", "v1"}
        assert pair.remote.tip(dot) == new and pair.remote.ref(dot, "tag/mine") is None
        assert pair.remote.catalog.signatures(dot, new) == []


def test_what_a_peer_says_it_knows() -> None:
    hello = messages.Hello(1, 1, ((sync_opening.TAGS, "1"),), (), "x", bytes(16), 1, ())
    assert sync_opening.knows_tags(hello)
    assert not sync_opening.knows_tags(replace(hello, capabilities=(("zstd", "1"),)))
    assert not sync_opening.knows_tags(None)


# --- hostile peers -----------------------------------------------------------------------------------


def refs_of(store: FakeStore, dot: DotId) -> tuple[dict[str, ObjectId], set[ObjectId]]:
    """What a peer could have changed: refs, and what is signed."""
    refs = {row.name: row.target for row in store.catalog.refs(dot)}
    return refs, store.catalog.signed(dot)


def bad_tag(store: FakeStore, dot: DotId, case: str, good: ObjectId, tag: ObjectId) -> ObjectId:
    """A tag object that no ref tag/bad may name."""
    target = {"name": good, "dangling": ObjectId(bytes(32)), "chain": tag}[case]
    return put_tag(store, dot, Tag(target, "innocent" if case == "name" else "bad", "a", 0, 0, "m"))


@pytest.mark.parametrize("case", ["name", "dangling", "chain"])
def test_bad_tag_objects_from_a_server_change_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    dot, _, tag = pushed(pair)
    new = pair.remote.commit(dot, {"a": b"3"})
    bad = bad_tag(pair.remote, dot, case, new, tag)
    server = "dmsync.engine.sync_server"
    lie = [RefValue("tag/bad", bad, None, new)]
    monkeypatch.setattr(f"{server}.advertised_tags", lambda store, dot, annotated: lie)
    monkeypatch.setattr(f"{server}.tags_to_send", lambda *asked: [bad])
    before = refs_of(pair.local, dot)
    outcome = pair.try_fetch(dot)
    assert isinstance(outcome.error, BadObject)
    assert refs_of(pair.local, dot) == before
    assert not pair.local.catalog.has_commit(dot, new)


@pytest.mark.parametrize("case", ["name", "dangling", "chain"])
def test_bad_tag_objects_from_a_client_change_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    dot, commits, tag = pushed(pair)
    bad = bad_tag(pair.local, dot, case, commits[0], tag)
    rows = [RefRow("tag/bad", bad, 1, None)]
    catalog = pair.local.catalog
    original = catalog.refs
    monkeypatch.setattr(
        catalog, "refs", lambda dot, prefix="": rows if prefix == "tag/" else original(dot, prefix)
    )
    monkeypatch.setattr("dmsync.engine.sync_push.peel", lambda store, dot, oid: commits[0])
    before = refs_of(pair.remote, dot)
    outcome = pair.try_push(dot, tags=True)
    assert isinstance(outcome.error, BadObject if case == "name" else ObjectMissing)
    assert refs_of(pair.remote, dot) == before


@pytest.mark.parametrize(
    "name", ["tag/a/b", "tag/../x", "tag/", "tag/v.", "tag/a..b", "tag/\x1b[0m"]
)
def test_hostile_tag_names_do_not_pass_the_wire(name: str) -> None:
    assert not is_ref_name(name)
    reply = messages.RefsReply(
        None, "", None, "", "", None, 1, 1, (RefValue(name, ObjectId(bytes(32))),)
    )
    frame = messages.frame_from_message(reply)
    with pytest.raises(ProtocolError):
        messages.message_from_frame(frame)


def send_signatures(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, *found: tuple[ObjectId, bytes]
) -> None:
    """Let the pushing side send these signatures."""

    def pages(store: object, dot: DotId, transfer: bytes, targets: object) -> list[Signatures]:
        return [Signatures(transfer, (item,)) for item in found]

    monkeypatch.setattr("dmsync.engine.sync_push.signature_pages", pages)


def test_signatures_are_bounded_by_number(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    dot, _, _ = pushed(pair)
    new = pair.local.commit(dot, {"a": b"9"})
    many = [(new, ARMOUR + b"%d" % (number % 40)) for number in range(100)]
    send_signatures(pair, monkeypatch, *many)
    pair.push(dot)
    kept = pair.remote.catalog.signatures(dot, new)
    assert kept == [ARMOUR + b"%d" % number for number in range(16)]


@pytest.mark.parametrize("case", ["stranger", "no-armour", "not-ascii", "too-many-bytes"])
def test_signatures_that_break_the_rules_end_the_push(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    dot, _, _ = pushed(pair)
    new = pair.local.commit(dot, {"a": b"9"})
    found = {
        "stranger": [(ObjectId(bytes(32)), ARMOUR)],
        "no-armour": [(new, b"\x1b[31m")],
        "not-ascii": [(new, ARMOUR + b"\xff")],
        "too-many-bytes": [(new, ARMOUR.ljust(limits.SIGNATURE_BYTES_MAX, b"x"))] * 513,
    }[case]
    send_signatures(pair, monkeypatch, *found)
    before = refs_of(pair.remote, dot)
    outcome = pair.try_push(dot)
    assert isinstance(outcome.server_error, ProtocolError)
    assert refs_of(pair.remote, dot) == before


def test_a_commit_cannot_pass_for_a_tag(pair: Pair) -> None:
    """Ids are separated by kind: the same bytes have another id as another kind."""
    data = Commit(ROOT_ENTRY, (), "a", "a", 0, 0, "").to_bytes()
    assert object_id(Kind.COMMIT, data) != object_id(Kind.TAG, data)
    dot, commits, _ = pushed(pair)
    with pytest.raises(ObjectMissing):
        pair.local.objects(dot).read(Kind.TAG, commits[0])
