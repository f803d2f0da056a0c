"""Commits in a file: full and incremental, verified, applied twice, truncated and refused."""

import random
from pathlib import Path

import pytest
from blake3 import blake3

from dmsync.engine.bundles import HASH_BYTES
from dmsync.wire.bundle_header import BUNDLE_CONTEXT
from tests.support.cluster import Cluster, MakeCluster

EXPECTED = {
    "bad-bundle", "bad-object", "hash-mismatch", "object-missing", "protocol", "format-unsupported",
    "no-revision", "corruption", "dot-id-clash", "version", "exists", "no-dot", "invalid-name",
}  # fmt: skip


@pytest.fixture
def shop(make_cluster: MakeCluster) -> Cluster:
    """Three commits on master, one more on a branch."""
    shop = make_cluster("shop")
    shop.init("app", {"stock": "3 apples\n", "blob": random.Random(1).randbytes(300_000)})
    shop.commit("one")
    shop.write("app", {"stock": "2 apples\n"})
    shop.commit("two")
    shop.run("tag", "v1")
    shop.run("checkout", "-b", "topic")
    shop.write("app", {"topic": "t\n"})
    shop.commit("on topic")
    shop.run("checkout", "master")
    shop.write("app", {"stock": "1 apple\n"})
    shop.commit("three")
    return shop


def create(cluster: Cluster, file: Path, *arguments: str) -> dict[str, object]:
    return cluster.run("bundle", "create", file, *arguments, "--json").summary()


def test_full_bundle_gives_the_same_ids_as_a_push(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    file = tmp_path / "app.dmb"
    summary = create(shop, file, "--all", "--tags")
    assert summary["commits"] == 4 and summary["bytes_written"] == file.stat().st_size
    pushed, carried = make_cluster("pushed"), make_cluster("carried")
    pushed.run("init", "--bare")
    shop.run("remote", "add", "p", str(pushed.home))
    shop.run("push", "p", "--all", "--tags")
    carried.run("bundle", "apply", file)
    for branch in ("master", "topic", "v1"):
        ids = {c.tip(branch, dot="app") for c in (shop, pushed, carried)}
        assert len(ids) == 1
    assert carried.files("app") == shop.files("app")
    assert carried.run("list", "--json").json()[0]["current"]
    carried.run("fsck", "--full")


def test_incremental_bundles_build_on_each_other(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    first, second = tmp_path / "1.dmb", tmp_path / "2.dmb"
    create(shop, first, "v1", "topic")
    summary = create(shop, second, "v1..master")
    assert summary["commits"] == 1 and second.stat().st_size < first.stat().st_size / 10
    other = make_cluster("other")
    done = other.refused("bundle", "apply", second, code=10, saying="builds on 1 commits")
    assert shop.tip("v1")[:12] in done.stderr
    assert not other.home.exists() or other.dots() == []
    assert other.run("bundle", "apply", first).code == 0
    other.run("bundle", "apply", second)
    assert other.tip("master", dot="app") == shop.tip("master")
    other.run("fsck", "--full")


def test_applying_twice_changes_nothing(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    file = tmp_path / "app.dmb"
    create(shop, file)
    other = make_cluster("other")
    other.run("bundle", "apply", file, "--local-name", "copy")
    before, log = other.stored_bytes(), other.run("op", "log").stdout
    assert "up to date" in other.run("bundle", "apply", file).stdout
    assert other.stored_bytes() == before and other.run("op", "log").stdout == log
    assert other.dots() == ["copy"]


def test_a_name_that_another_dot_has_is_told_with_the_way_out(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    file = tmp_path / "app.dmb"
    create(shop, file)
    other = make_cluster("other")
    other.init("app")
    done = other.run("bundle", "apply", file, check=False)
    assert done.code != 0 and "dm bundle apply --local-name" in done.stderr
    other.run("bundle", "apply", file, "--local-name", "copy")


def test_a_tree_follows_and_uncommitted_changes_are_not_lost(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    full, more = tmp_path / "full.dmb", tmp_path / "more.dmb"
    create(shop, full)
    other = make_cluster("other")
    other.run("bundle", "apply", full)
    before = other.files("app")
    shop.write("app", {"stock": "0 apples\n"})
    shop.commit("four")
    create(shop, more, "HEAD~1..master")
    other.write("app", {"mine": "unsaved\n"})
    other.refused("bundle", "apply", more, code=18, saying="uncommitted")
    assert other.files("app") == {**before, "mine": "unsaved\n"}
    (other.tree("app") / "mine").unlink()
    other.run("bundle", "apply", more)
    assert other.files("app")["stock"] == "0 apples\n"


def test_diverged_branches_are_refused_stashed_or_replaced(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    full, more = tmp_path / "full.dmb", tmp_path / "more.dmb"
    create(shop, full)
    other = make_cluster("other")
    other.run("bundle", "apply", full)
    other.write("app", {"mine": "m\n"})
    mine = other.commit("mine")
    shop.write("app", {"theirs": "t\n"})
    theirs = shop.commit("theirs")
    create(shop, more, "HEAD~1..master")
    other.refused("bundle", "apply", more, code=14)
    assert other.tip("master") == mine
    other.run("bundle", "apply", more, "--stash-on-divergence")
    assert other.tip("master") == theirs
    assert any("DIVERGED" in branch for branch in other.branches())


def test_dry_runs_write_nothing(shop: Cluster, make_cluster: MakeCluster, tmp_path: Path) -> None:
    file = tmp_path / "app.dmb"
    create(shop, file, "--dry-run")
    assert not file.exists()
    create(shop, file)
    other = make_cluster("other")
    other.run("init", "--bare")
    other.run("bundle", "apply", file, "--dry-run")
    assert other.dots() == []


def test_verify_tells_what_is_in_it_and_what_it_needs(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    file = tmp_path / "app.dmb"
    create(shop, file, "v1..master")
    told = shop.run("bundle", "verify", file, "--json").json()
    assert told["refs"] == [{"ref": "branch/master", "id": shop.tip("master")}]
    assert told["prerequisites"] == [shop.tip("v1")]
    other = make_cluster("other")
    assert "no store here" in other.run("bundle", "verify", file).stderr
    other.run("init", "--bare")
    other.refused("bundle", "verify", file, code=10)


def test_every_truncation_and_every_changed_byte_is_refused(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    file, bad = tmp_path / "app.dmb", tmp_path / "bad.dmb"
    create(shop, file, "v1..master")
    whole = file.read_bytes()
    other = make_cluster("other")
    other.run("init", "--bare")
    chance = random.Random(7)
    cases = [whole[:n] for n in (0, 1, 7, 11, 12, 40, len(whole) - 33, len(whole) - 1)]
    cases += [whole + b"x", whole[::-1]]
    for _ in range(6):
        at = chance.randrange(len(whole))
        cases.append(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
    for case in cases:
        bad.write_bytes(case)
        other.refused("bundle", "verify", bad, code=16)
        error = other.refused("bundle", "apply", bad, "--json", code=16).error()
        assert error["code"] == "bad-bundle"
    assert other.dots() == []


@pytest.mark.parametrize(
    ("arguments", "code", "saying"),
    [
        (("HEAD~1",), 2, "branch or tag"),
        (("nothing",), 10, "nothing"),
        (("master...topic",), 2, "not A...B"),
        (("master..v1",), 4, "no commits are left"),
        (("unknown..master",), 10, "unknown"),
        (("..",), 2, "at least one end"),
    ],
)
def test_bad_requests_write_no_file(
    shop: Cluster, tmp_path: Path, arguments: tuple[str, ...], code: int, saying: str
) -> None:
    file = tmp_path / "app.dmb"
    shop.refused("bundle", "create", file, *arguments, code=code, saying=saying)
    assert list(tmp_path.glob("*.dmb*")) == []


def test_an_existing_file_is_kept_unless_forced(shop: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "app.dmb"
    file.write_text("precious")
    shop.refused("bundle", "create", file, code=1, saying="exists already")
    assert file.read_text() == "precious"
    create(shop, file, "--force")
    shop.run("bundle", "verify", file)


def test_a_large_bundle_flows_in_bounded_pieces(make_cluster: MakeCluster, tmp_path: Path) -> None:
    big, other = make_cluster("big"), make_cluster("other")
    big.init("app", {"data": random.Random(3).randbytes(40_000_000)})
    big.commit("forty megabytes")
    file = tmp_path / "big.dmb"
    create(big, file)
    done, peak_bytes = other.run_measured("bundle", "apply", file)
    assert done.code == 0 and peak_bytes < 200_000_000
    assert other.tip(dot="app") == big.tip()
    other.run("fsck", "--full")


def test_hostile_content_under_a_right_hash_is_refused_with_a_typed_error(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """Whoever makes a bundle can close it with a right hash: its content is checked like a peer's."""
    file, bad = tmp_path / "app.dmb", tmp_path / "bad.dmb"
    create(shop, file, "v1..master")
    full = tmp_path / "full.dmb"
    create(shop, full, "v1")
    other = make_cluster("other")
    other.run("bundle", "apply", full)
    before = other.run("log", "--json").stdout
    content = file.read_bytes()[:-HASH_BYTES]
    chance = random.Random(11)
    refused = 0
    for _ in range(40):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 3))):
            changed[chance.randrange(8, len(changed))] ^= 1 << chance.randrange(8)
        closing = blake3(changed, derive_key_context=BUNDLE_CONTEXT).digest()
        bad.write_bytes(bytes(changed) + closing)
        done = other.run("bundle", "apply", bad, "--json", check=False)
        if done.code:
            refused += 1
            assert done.error()["code"] in EXPECTED, done.describe()
            assert other.run("log", "--json").stdout == before
        else:  # the bit said nothing: a name, a count for progress
            other.run("reset", "--hard", "v1")
            before = other.run("log", "--json").stdout
    assert refused > 12
    other.run("fsck", "--full")


def test_a_pruned_history_travels_with_hollow_commits(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    shop.run("tag", "-d", "v1")
    assert shop.run("prune", "--keep-last", "1", "--json").summary()["thinned"] == 1
    file = tmp_path / "app.dmb"
    create(shop, file, "--all")
    other = make_cluster("other")
    done = other.run("bundle", "apply", file, "--json").summary()
    assert done["commits_hollow"] == 1
    assert other.messages("master", dot="app") == shop.messages("master")
    assert other.files("app") == shop.files("app")
    other.refused("ls", "master~2:", code=10, saying="content")
    other.run("fsck", "--full")
    shop.refused("bundle", "create", tmp_path / "no.dmb", "master~2..master", code=10)


def test_a_tag_on_a_thinned_commit_stops_nobody(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    shop.run("tag", "-d", "v1")
    shop.run("tag", "old", "master~2")
    shop.run("prune", "--keep-last", "1", "--keep-tag", "none")
    bare, clone, carried = (make_cluster(name) for name in ("bare", "clone", "carried"))
    bare.run("init", "--bare")
    shop.run("remote", "add", "bare", str(bare.home))
    assert "left out" in shop.run("push", "bare", "--all", "--tags").stderr
    clone.run("clone", str(shop.home), "app")
    create(shop, tmp_path / "all.dmb", "--all", "--tags")
    carried.run("bundle", "apply", tmp_path / "all.dmb")
    for cluster in (bare, clone, carried):
        assert cluster.tip("master", dot="app") == shop.tip("master")
        cluster.run("fsck", "--full")
    shop.refused("export", "master~2", tmp_path / "out", code=10)
    shop.refused("export", "master~2", tmp_path / "out.tar", code=10)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tar").exists()


def test_a_partial_clone_makes_no_bundle(make_cluster: MakeCluster, tmp_path: Path) -> None:
    whole, part = make_cluster("whole"), make_cluster("part")
    whole.init("app", {"a": "1"})
    (whole.tree("app").parent / "cache").mkdir()
    (whole.tree("app").parent / "cache" / "c").write_text("2")
    whole.commit("both")
    part.run("clone", str(whole.home), "app", "--subdot", "cache")
    part.refused("bundle", "create", tmp_path / "x.dmb", code=10, saying="would lack the rest")
    assert not (tmp_path / "x.dmb").exists()


def test_a_dot_made_of_a_bundle_begins_on_a_branch_that_it_has(
    shop: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    create(shop, tmp_path / "topic.dmb", "topic")
    other = make_cluster("other")
    other.run("bundle", "apply", tmp_path / "topic.dmb")
    assert other.tip(dot="app") == shop.tip("topic")
    assert other.files("app")["topic"] == "t\n"
