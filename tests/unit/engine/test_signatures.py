"""Signatures against the stock ssh-keygen, in both directions, and against hostile bytes."""

import time
from base64 import b64decode, b64encode
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import signed_message
from dmsync.core.sshsig import ARMOUR_BYTES_MAX, parse_signature
from dmsync.engine.allowed_signers import matches_patterns, read_allowed_signers
from dmsync.engine.signatures import SigningKey, Standing, Verdict, judge_signature, sign
from dmsync.errors import BadObject, ConfigError, SigningFailed
from tests.support.signers import (
    Signer,
    certify,
    make_signer,
    sign_stock,
    ssh_keygen,
    verify_stock,
)

OID = ObjectId(bytes(range(32)))
MESSAGE = signed_message(Kind.COMMIT, OID)
KINDS = ("ed25519", "rsa", "ecdsa")


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return make_signer(tmp_path, "key")


@pytest.fixture
def allowed(tmp_path: Path, signer: Signer) -> Path:
    return allow(tmp_path, f"ada@example.org {signer.public}")


def allow(directory: Path, *lines: str) -> Path:
    path = directory / "allowed"
    path.write_text("\n".join(lines) + "\n")
    return path


def look(
    armour: bytes, allowed: Path, kind: Kind = Kind.COMMIT, now_s: float | None = None
) -> Verdict:
    now_s = time.time() if now_s is None else now_s
    return judge_signature(armour, kind, OID, read_allowed_signers(str(allowed)), now_s)


def armoured(blob: bytes) -> bytes:
    text = b64encode(blob)
    lines = b"\n".join(text[at : at + 70] for at in range(0, len(text), 70))
    return b"-----BEGIN SSH SIGNATURE-----\n" + lines + b"\n-----END SSH SIGNATURE-----\n"


def blob_of(armour: bytes) -> bytes:
    return b64decode(b"".join(armour.split(b"\n")[1:-2]))


def string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


# --- interoperability ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ssh_keygen_verifies_what_dm_signs(tmp_path: Path, kind: str) -> None:
    signer = make_signer(tmp_path, kind, kind)
    allowed = allow(tmp_path, f"ada@example.org {signer.public}")
    armour = sign(SigningKey(str(signer.path)), Kind.COMMIT, OID)
    assert b"dm commit " + OID.hex().encode() + b"\n" == MESSAGE
    assert verify_stock(allowed, "ada@example.org", armour, MESSAGE)
    assert not verify_stock(allowed, "ada@example.org", armour, MESSAGE + b"x")


@pytest.mark.parametrize("kind", KINDS)
def test_dm_verifies_what_ssh_keygen_signs(tmp_path: Path, kind: str) -> None:
    signer = make_signer(tmp_path, kind, kind)
    allowed = allow(tmp_path, "# ours", "", f"ada@example.org {signer.public} comment here")
    verdict = look(sign_stock(signer, MESSAGE), allowed)
    assert (verdict.standing, verdict.principal) == (Standing.GOOD, "ada@example.org")
    listed = ssh_keygen("-l", "-f", f"{signer.path}.pub").stdout.decode()
    assert verdict.fingerprint in listed


@pytest.mark.parametrize("kind", KINDS)
def test_without_ssh_keygen_the_library_signs(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = make_signer(tmp_path, kind, kind)
    allowed = allow(tmp_path, f"ada@example.org {signer.public}")
    monkeypatch.setattr("shutil.which", lambda name: None)
    armour = sign(SigningKey(str(signer.path)), Kind.TAG, OID)
    assert verify_stock(allowed, "ada@example.org", armour, signed_message(Kind.TAG, OID))


def test_a_certificate_counts_by_its_authority(tmp_path: Path) -> None:
    authority, signer = make_signer(tmp_path, "ca"), make_signer(tmp_path, "key")
    plain = sign_stock(signer, MESSAGE)
    certify(authority, signer, ["bob", "ada@example.org"])
    allowed = allow(tmp_path, f'*@example.org cert-authority,namespaces="dm" {authority.public}')
    armour = sign(SigningKey(str(signer.certificate)), Kind.COMMIT, OID)
    assert parse_signature(armour).is_certificate
    assert verify_stock(allowed, "ada@example.org", armour, MESSAGE)
    assert look(armour, allowed) == Verdict(
        Standing.GOOD, "ada@example.org", look(armour, allowed).fingerprint,
        "ssh-ed25519-cert-v01@openssh.com",
    )  # fmt: skip
    # a plain signature with the key replaced by its certificate is the same (see below)
    assert look(with_certificate(plain, signer), allowed).principal
    # the line of the key alone is not about its certificate
    alone = allow(tmp_path, f"* {signer.public}")
    assert look(armour, alone).standing is Standing.UNKNOWN
    assert not verify_stock(alone, "ada@example.org", armour, MESSAGE)
    assert look(plain, alone).standing is Standing.GOOD
    # without cert-authority the line is about the authority's own signatures
    assert look(armour, allow(tmp_path, f"* {authority.public}")).standing is Standing.UNKNOWN


def with_certificate(armour: bytes, signer: Signer) -> bytes:
    """The signature as ssh-keygen makes it with the certificate, whether or not that is valid."""
    certificate = b64decode(signer.certificate.read_text().split()[1])
    key = b64decode(signer.public.split()[1])
    return armoured(blob_of(armour).replace(string(key), string(certificate), 1))


@pytest.mark.parametrize(
    ("principals", "options", "reason"),
    [
        (["eve@elsewhere.org"], (), "names no allowed principal"),
        ([], (), "names no allowed principal"),
        (["a@example.org"], ("-V", "20200101:20200102"), "Certificate expired"),
        (["a@example.org"], ("-V", "20980101:20990102"), "not yet valid"),
        (["a@example.org"], ("-h",), "Invalid certificate type"),
    ],
)
def test_certificates_that_do_not_count_as_in_ssh_keygen(
    tmp_path: Path, principals: list[str], options: tuple[str, ...], reason: str
) -> None:
    authority, signer = make_signer(tmp_path, "ca"), make_signer(tmp_path, "key")
    plain = sign_stock(signer, MESSAGE)
    certify(authority, signer, principals, *options)
    allowed = allow(tmp_path, f"*@example.org cert-authority {authority.public}")
    armour = with_certificate(plain, signer)
    verdict = look(armour, allowed)
    assert verdict.standing is Standing.UNKNOWN and reason in verdict.reason
    assert not verify_stock(allowed, "a@example.org", armour, MESSAGE)


# --- whose signatures count ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ('valid-before="20200101"', "not allowed any more"),
        ('valid-after="20980101Z"', "not allowed yet"),
        ('namespaces="git,file"', "other namespaces"),
        ('namespaces="*,!dm"', "other namespaces"),
        ("cert-authority", "not among"),
    ],
)
def test_lines_that_do_not_allow_the_key_as_in_ssh_keygen(
    tmp_path: Path, signer: Signer, options: str, reason: str
) -> None:
    allowed = allow(tmp_path, f"ada@example.org {options} {signer.public}")
    armour = sign_stock(signer, MESSAGE)
    verdict = look(armour, allowed)
    assert verdict.standing is Standing.UNKNOWN and reason in verdict.reason
    assert not verify_stock(allowed, "ada@example.org", armour, MESSAGE)


def test_lines_that_allow_the_key_as_in_ssh_keygen(tmp_path: Path, signer: Signer) -> None:
    armour = sign_stock(signer, MESSAGE)
    other = make_signer(tmp_path, "other")
    for options in ('namespaces="git,d*"', 'valid-after="20200101",Valid-Before="20980101000000Z"'):
        allowed = allow(tmp_path, f"x {other.public}", f'"ada@a,bob@*" {options} {signer.public}')
        assert look(armour, allowed).principal == "ada@a,bob@*"
        assert verify_stock(allowed, "ada@a", armour, MESSAGE)


def test_validity_is_judged_at_the_time_given(tmp_path: Path, signer: Signer) -> None:
    allowed = allow(tmp_path, f'a valid-after="20260102Z",valid-before="20260103Z" {signer.public}')
    armour = sign_stock(signer, MESSAGE)
    first = 1_767_312_000  # 2026-01-02T00:00:00Z
    standings = [look(armour, allowed, now_s=first + at).standing for at in (-1, 0, 86_399, 86_400)]
    assert standings == [Standing.UNKNOWN, Standing.GOOD, Standing.GOOD, Standing.UNKNOWN]


def test_an_unknown_key_is_told_from_a_bad_signature(tmp_path: Path, signer: Signer) -> None:
    armour = sign_stock(signer, MESSAGE)
    allowed = allow(tmp_path, f"* {make_signer(tmp_path, 'other').public}")
    assert look(armour, allowed).standing is Standing.UNKNOWN
    assert look(armour, allowed, Kind.TAG).standing is Standing.BAD


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("ada", "no key"),
        ("ada ssh-ed25519 AAAA", "no key that can be read"),
        ("ada frobnicate ssh-ed25519 {key}", "unknown"),
        ('ada namespaces="dm",namespaces="x" ssh-ed25519 {key}', "given twice"),
        ("ada valid-after ssh-ed25519 {key}", "needs value"),
        ("ada cert-authority=1 ssh-ed25519 {key}", "takes no value"),
        ('ada valid-before="20261301" ssh-ed25519 {key}', "no time of the calendar"),
        ('ada valid-before="soon" ssh-ed25519 {key}', "not a time"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(
    tmp_path: Path, signer: Signer, line: str, what: str
) -> None:
    key = signer.public.split()[1]
    path = allow(tmp_path, "# first", line.format(key=key))
    with pytest.raises(ConfigError) as caught:
        read_allowed_signers(str(path))
    assert "line 2" in caught.value.message and what in caught.value.message


def test_an_allowed_signers_file_is_bounded_and_must_be_there(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"#" * (5 * 1024 * 1024))
    for path in (big, tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            read_allowed_signers(str(path))


@pytest.mark.parametrize(
    ("text", "patterns", "found"),
    [
        ("a.b", "a?b", True), ("ab", "a?b", False), ("a\nb", "a*", True), ("dm", "*,!d*", False),
        ("dm", "!git", False), ("[x]", "[x]", True), ("x", "[x]", False), ("", "*", True),
    ],
)  # fmt: skip
def test_pattern_lists(text: str, patterns: str, found: bool) -> None:
    assert matches_patterns(text, patterns) is found


# --- what cannot be signed -------------------------------------------------------------------------


def test_a_passphrase_is_never_asked_for_without_a_terminal(tmp_path: Path) -> None:
    signer = make_signer(tmp_path, "locked", passphrase="open sesame")
    began = time.monotonic()
    with pytest.raises(SigningFailed) as caught:
        sign(SigningKey(str(signer.path)), Kind.COMMIT, OID)
    assert time.monotonic() - began < 10
    assert "ssh-agent" in caught.value.hint


def test_a_passphrase_protected_key_without_ssh_keygen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = make_signer(tmp_path, "locked", passphrase="open sesame")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SigningFailed):
        sign(SigningKey(str(signer.path)), Kind.COMMIT, OID)


@pytest.mark.parametrize("content", [b"", b"no key\n", b"\0" * 100])
def test_what_is_no_key_signs_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "-odd name"
    path.write_bytes(content)
    with pytest.raises(SigningFailed):
        sign(SigningKey(str(path)), Kind.COMMIT, OID)


# --- hostile signatures ----------------------------------------------------------------------------


def test_no_flipped_byte_passes(signer: Signer, allowed: Path) -> None:
    armour = sign_stock(signer, MESSAGE)
    blob = blob_of(armour)
    assert look(armoured(blob), allowed).standing is Standing.GOOD
    for position in range(len(blob)):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << position % 8
        verdict = look(armoured(bytes(flipped)), allowed)
        assert verdict.standing is Standing.BAD and verdict.reason, position


@pytest.mark.parametrize("kind", ("rsa", "ecdsa"))
def test_no_damaged_field_passes(tmp_path: Path, kind: str) -> None:
    signer = make_signer(tmp_path, kind, kind)
    allowed = allow(tmp_path, f"a {signer.public}")
    blob = blob_of(sign_stock(signer, MESSAGE))
    for position in range(0, len(blob), 7):
        for damaged in (blob[:position], blob[:position] + b"\xff" + blob[position + 1 :]):
            if damaged != blob:
                assert look(armoured(damaged), allowed).standing is Standing.BAD, position


def test_another_namespace_or_message_is_bad(signer: Signer, allowed: Path) -> None:
    verdict = look(sign_stock(signer, MESSAGE, "git"), allowed)
    assert verdict.standing is Standing.BAD and "'git'" in verdict.reason
    for message in (MESSAGE[:-1], MESSAGE.replace(b"commit", b"tag"), MESSAGE.upper()):
        assert look(sign_stock(signer, message), allowed).standing is Standing.BAD


def test_signatures_that_are_none(signer: Signer, allowed: Path) -> None:
    armour = sign_stock(signer, MESSAGE)
    blob = blob_of(armour)
    hostile = [
        b"",
        armour[: len(armour) // 2],
        armour + armour,
        armour.replace(b"SSH", b"PGP"),
        armour + b"\x1b[31m",
        armoured(blob + b"\0"),
        armoured(blob[:6] + b"\0\0\0\2" + blob[10:]),
        armoured(b"SSHSIG\0\0\0\1" + b"\xff" * 20),
        armour.replace(b"\n", b"\n" * ARMOUR_BYTES_MAX, 1),
        armoured(b"\0" * ARMOUR_BYTES_MAX),
    ]
    for bad in hostile:
        assert look(bad, allowed).standing is Standing.BAD, bad[:80]
        with pytest.raises(BadObject):
            parse_signature(bad)


def test_rsa_with_sha1_is_refused(tmp_path: Path) -> None:
    signer = make_signer(tmp_path, "rsa", "rsa")
    blob = blob_of(sign_stock(signer, MESSAGE))
    weak = blob.replace(string(b"rsa-sha2-512"), string(b"ssh-rsa"))
    fixed = weak.replace(
        len(string(b"rsa-sha2-512") + string(b"\0" * 256)).to_bytes(4, "big"),
        len(string(b"ssh-rsa") + string(b"\0" * 256)).to_bytes(4, "big"),
    )
    verdict = look(armoured(fixed), allow(tmp_path, f"a {signer.public}"))
    assert verdict.standing is Standing.BAD and "ssh-rsa" in verdict.reason
