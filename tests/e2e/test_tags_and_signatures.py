"""Tags and signatures through the command: stock ssh-keygen, an agent, a terminal, two clusters."""

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import DM, Cluster, MakeCluster
from tests.support.signers import Signer, make_signer, ssh_keygen, verify_stock

PASSPHRASE = "correct horse battery"


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return make_signer(tmp_path, "signer")


def configure(cluster: Cluster, signer: Signer | None, allowed: Path) -> None:
    """Name the key and the allowed signers in the user's configuration."""
    lines = ["[user]", f'allowed-signers = "{allowed}"']
    if signer is not None:
        lines.append(f'signing-key = "{signer.path}"')
    path = Path(cluster.environment["HOME"]) / ".config" / "dm" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)


def allow(directory: Path, signer: Signer, options: str = "") -> Path:
    path = directory / "allowed_signers"
    path.write_text(f"ada@example.org {options} {signer.public}\n")
    return path


@pytest.fixture
def signed(cluster: Cluster, tmp_path: Path, signer: Signer) -> Cluster:
    """An unsigned commit, a signed one and a signed tag upon it."""
    configure(cluster, signer, allow(tmp_path, signer))
    cluster.init("apples", {"a": "1"})
    cluster.commit("unsigned")
    cluster.commit("signed", "-S")
    cluster.run("tag", "v1.0", "-s", "-m", "release\n\nwith \x1b[31m notes")
    return cluster


def test_what_dm_signs_ssh_keygen_verifies_from_files(signed: Cluster, tmp_path: Path) -> None:
    """The shell line of `dm verify --help`."""
    allowed = tmp_path / "allowed_signers"
    commit = signed.tip()
    tag = next(t for t in signed.run("tag", "--json").json() if t["name"] == "v1.0")
    for name, message in ((commit, f"dm commit {commit}\n"), ("v1.0", f"dm tag {tag['target']}\n")):
        armour = signed.run("verify", "--raw", name).stdout.encode()
        assert verify_stock(allowed, "ada@example.org", armour, message.encode())
        assert not verify_stock(allowed, "ada@example.org", armour, message.upper().encode())
    assert "ssh-keygen -Y verify -n dm" in signed.run("verify", "--help").stdout


def test_verify_answers_by_its_exit_code(signed: Cluster, tmp_path: Path) -> None:
    good = signed.run("verify", "v1.0", "HEAD")
    assert good.stdout.count("good, by ada@example.org with ssh-ed25519 SHA256:") == 2
    bad = signed.refused("verify", "HEAD", "HEAD~1", code=1, saying="has no signature")
    assert signed.tip("HEAD~1") in bad.stderr
    signed.run("verify", "HEAD~1..HEAD")
    error = signed.run("verify", "HEAD~1", "--json", check=False)
    assert error.error()["code"] == "bad-signature" and error.json()[0]["status"] == "none"
    signed.refused("tag", "-v", "v2.0", code=10)
    assert "good" in signed.run("tag", "-v", "v1.0").stdout
    stranger = make_signer(tmp_path, "stranger")
    others = tmp_path / "others"
    for line, why in (
        (f"eve {stranger.public}", "not among the allowed signers"),
        (f'ada valid-before="20200101" {(make_public(tmp_path))}', "not allowed any more"),
        (f'ada namespaces="git" {(make_public(tmp_path))}', "other namespaces"),
    ):
        others.write_text(line + "\n")
        signed.refused("verify", "v1.0", "--allowed-signers", others, code=1, saying=why)
    others.write_text("not a line\n")
    signed.refused("verify", "--allowed-signers", others, code=2, saying="line 1")
    signed.refused("verify", "--allowed-signers", tmp_path / "none", code=2)
    signed.refused("verify", "--raw", "HEAD~1", code=1, saying="has no signature")


def make_public(directory: Path) -> str:
    return Signer(directory / "signer").public


def test_log_and_show_tell_what_signatures_are_worth(signed: Cluster, tmp_path: Path) -> None:
    log = signed.run("log", "--show-signature", "--json").json()
    assert [commit["signature"]["status"] for commit in log] == ["none", "good"]
    assert log[1]["signature"]["principal"] == "ada@example.org"
    assert "Signature: good, by ada@example.org" in signed.run("log", "--show-signature").stdout
    shown = signed.run("show", "v1.0", "--show-signature").stdout
    assert shown.startswith("tag v1.0\nSignature: good, by ada@example.org")
    assert "Tagger: solo <solo@test>\n" in shown and "    with \\x1b[31m notes\n" in shown
    assert f"\ncommit {signed.tip()}\nSignature: good" in shown
    tag = signed.run("show", "v1.0", "--show-signature", "--json").json()["tag"]
    assert (tag["name"], tag["signature"]["status"]) == ("v1.0", "good")
    (tmp_path / "allowed_signers").write_text("# nobody\n")
    assert "Signature: unknown key" in signed.run("log", "--show-signature").stdout


def test_signing_asks_for_a_key_and_fails_without_committing(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.init("apples", {"a": "1"})
    cluster.refused("commit", "-m", "m", "-S", code=2, saying="no key to sign with")
    cluster.refused("commit", "-m", "m", "--signing-key", tmp_path / "none", code=2)
    locked = make_signer(tmp_path, "locked", passphrase=PASSPHRASE)
    began = time.monotonic()
    refused = cluster.refused(
        "commit", "-m", "m", "--signing-key", locked.path, code=1, saying="cannot sign"
    )
    assert time.monotonic() - began < 30 and PASSPHRASE not in refused.stderr
    assert cluster.messages() == []
    cluster.commit("m", "--signing-key", str(make_signer(tmp_path, "open").path))
    assert cluster.messages() == ["m"]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The socket of an ssh-agent of this test."""
    socket = tmp_path / "agent.sock"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    while not socket.exists():
        time.sleep(0.02)
    yield str(socket)
    process.send_signal(signal.SIGTERM)
    process.wait(10)


def test_an_agent_signs_for_a_public_key(cluster: Cluster, tmp_path: Path, agent: str) -> None:
    signer = make_signer(tmp_path, "in-agent")
    environment = {"SSH_AUTH_SOCK": agent}
    subprocess.run(["ssh-add", "-q", signer.path], check=True, env={**os.environ, **environment})
    signer.path.unlink()
    allowed = allow(tmp_path, signer)
    cluster.init("apples", {"a": "1"})
    public = f"{signer.path}.pub"
    cluster.run("commit", "-m", "m", "--signing-key", public, env=environment)
    cluster.run("verify", "--allowed-signers", allowed)
    cluster.refused("commit", "-m", "n", "--signing-key", public, code=1, saying="cannot sign")


def test_at_a_terminal_the_passphrase_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    signer = make_signer(tmp_path, "locked", passphrase=PASSPHRASE)
    cluster.init("apples", {"a": "1"})
    arguments = ["commit", "-q", "-m", "m", "--signing-key", str(signer.path)]
    child, terminal = os.forkpty()
    if child == 0:
        os.execve(DM, [str(DM), *arguments], cluster.environment)
    seen = b""
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                data = os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            asked_before = b"passphrase" in seen.lower()
            seen += data
            if b"passphrase" in seen.lower() and not asked_before:
                os.write(terminal, PASSPHRASE.encode() + b"\n")
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    assert PASSPHRASE.encode() not in seen
    cluster.run("verify", "--allowed-signers", allow(tmp_path, signer))


def test_a_certificate_signs(cluster: Cluster, tmp_path: Path, signer: Signer) -> None:
    authority = make_signer(tmp_path, "ca")
    public = signer.path.with_name("signer.pub")
    ssh_keygen("-q", "-s", authority.path, "-I", "x", "-n", "ada@example.org", public)
    allowed = tmp_path / "allowed"
    allowed.write_text(f"*@example.org cert-authority {authority.public}\n")
    cluster.init("apples", {"a": "1"})
    cluster.run("commit", "-m", "m", "--signing-key", signer.certificate)
    assert "by ada@example.org" in cluster.run("verify", "--allowed-signers", allowed).stdout


def test_tags_are_made_listed_moved_and_deleted(cluster: Cluster) -> None:
    cluster.init("apples", {"a": "1"})
    first = cluster.commit("one")
    second = cluster.commit("two")
    cluster.run("tag", "v1", "HEAD~1")
    cluster.run("tag", "v2", "-m", "second\nline")
    assert cluster.run("tag").stdout == "v1\nv2\n"
    assert cluster.run("tag", "-N", "2").stdout == "v1\nv2  second\n    line\n"
    assert cluster.run("tag", "-l", "*2").stdout == "v2\n"
    assert cluster.run("tag", "--contains", "HEAD").stdout == "v2\n"
    assert cluster.tip("v1") == first and cluster.tip("v2") == second
    log = {commit["id"]: commit["refs"] for commit in cluster.run("log", "--json").json()}
    assert log == {first: ["tag/v1"], second: ["master", "tag/v2"]}
    cluster.refused("tag", "v1", code=1, saying="--force moves it")
    summary = cluster.run("tag", "v1", "-f", "--json").summary()
    assert (summary["old"], summary["target"], summary["annotated"]) == (first, second, False)
    dry = cluster.run("tag", "v3", "-n", "--json").summary()
    assert dry["dry_run"] and cluster.run("tag", "-l", "v3").stdout == ""
    cluster.refused("tag", "-d", "v1", "v9", code=10, saying="v9")
    cluster.run("tag", "-d", "v1", "v2")
    assert cluster.run("tag").stdout == ""
    cluster.run("fsck", "--full")


@pytest.mark.parametrize(
    "arguments",
    [
        ("tag", "a..b"), ("tag", "HEAD"), ("tag", "deadbeef"), ("tag", "a/b"), ("tag", "v", "-a"),
        ("tag", "v", "-m", " "), ("tag", "-d"), ("tag", "--verify"), ("tag", "-d", "-l", "x", "v"),
        ("tag", "v", "-l", "x"), ("tag", "a", "HEAD", "c"), ("tag", "v", "-s"),
    ],
)  # fmt: skip
def test_bad_arguments_change_nothing(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    cluster.init("apples", {"a": "1"})
    cluster.commit("one")
    cluster.refused(*arguments, code=2)
    assert cluster.run("tag").stdout == ""


def test_tags_and_signatures_reach_another_cluster_and_a_clone(
    pair: tuple[Cluster, Cluster], make_cluster: MakeCluster, tmp_path: Path, signer: Signer
) -> None:
    near, far = pair
    allowed = allow(tmp_path, signer)
    configure(near, signer, allowed)
    near.init("apples", {"a": "1"})
    near.commit("one", "-S")
    near.run("tag", "v1.0", "-s", "-m", "release")
    near.run("tag", "light")
    near.run("push", "far", "--tags")
    again = near.run("push", "far", "--tags", "--json").summary()
    assert again["nothing_to_do"] and again["round_trips"] == 1
    far.run("switch", "apples")
    assert far.run("tag").stdout == "light\nv1.0\n"
    far.run("verify", "v1.0", "light", "--allowed-signers", allowed)
    far.run("tag", "late", "-m", "made there")
    far.run("tag", "-f", "light", "-m", "moved there")
    pulled = near.run("pull", "far", "--json")
    assert pulled.summary()["tags_kept"] == ["light"] and "light" in pulled.stderr
    assert "late" in near.run("tag").stdout
    clone = make_cluster("clone")
    clone.add_remote("far", far)
    clone.run("clone", "far", "apples")
    assert clone.run("tag").stdout == "late\nlight\nv1.0\n"
    clone.run("verify", "v1.0", "HEAD", "--allowed-signers", allowed)
    assert clone.run("fsck", "--full").code == 0
    assert re.search(r"^tag late$", clone.run("show", "late").stdout, re.MULTILINE)
    for cluster in (near, far, clone):
        ids = {
            tag["name"]: tag["target"] for tag in json.loads(cluster.run("tag", "--json").stdout)
        }
        assert ids["v1.0"] == near.run("show", "v1.0", "--json").json()["tag"]["id"]


def test_a_bundle_brings_annotated_tags(
    cluster: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster.init("apples", {"a": "1"})
    first = cluster.commit("one")
    cluster.commit("two")
    cluster.run("tag", "v1.0", "HEAD~1", "-m", "release")
    cluster.run("tag", "light", "HEAD~1")
    cluster.run("bundle", "create", tmp_path / "all.bundle", "--all", "--tags")
    cluster.run("bundle", "create", tmp_path / "tag.bundle", "v1.0")
    for name, tags in (("all", "light\nv1.0\n"), ("tag", "v1.0\n")):
        other = make_cluster(name)
        other.run("bundle", "apply", tmp_path / f"{name}.bundle")
        assert other.run("tag", "--dot", "apples").stdout == tags
        assert other.tip("v1.0", dot="apples") == first
        assert "no problems" in other.run("fsck", "--full").stderr


def test_a_bundle_brings_signatures(
    signed: Cluster, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    signed.run("bundle", "create", tmp_path / "all.bundle", "--all", "--tags")
    signed.run("bundle", "verify", tmp_path / "all.bundle")
    other = make_cluster("other")
    configure(other, None, tmp_path / "allowed_signers")
    other.run("bundle", "apply", tmp_path / "all.bundle")
    assert other.run("verify", "HEAD", "v1.0").code == 0
    other.refused("verify", "HEAD~1", code=1)
