"""SSH signatures of commits and tags: making, storing and judging them (protocol/OBJECTS.md 7).

Signing goes through `ssh-keygen -Y sign` where it is installed, so that agents, hardware keys and
certificates work; judging needs no other program. A signature says nothing by itself: what counts
is whether its key is in the allowed-signers file of whoever asks.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import signed_message
from dmsync.core.sshsig import NAMESPACE, SshSignature, parse_signature
from dmsync.engine.allowed_signers import AllowedSigner, matches
from dmsync.engine.ports import SyncStore
from dmsync.errors import BadObject, SigningFailed

if TYPE_CHECKING:
    from asyncssh.public_key import SSHOpenSSHCertificate

SIGN_TIMEOUT_S: Final = 120.0
"""Without a terminal: a key that must be touched, or an agent that asks, gets this long."""
_MESSAGE_CHARACTERS: Final = 300


class Standing(StrEnum):
    """What became of looking at a signature."""

    GOOD = "good"
    """It fits, and an allowed signer made it."""
    UNKNOWN = "unknown-key"
    """It fits, but its key is not allowed (now, or for dm)."""
    BAD = "bad"
    """It does not fit, or is none."""
    NONE = "none"
    """There is no signature."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """`path`: a private key, or a public key or certificate whose private half an agent holds.
    `may_prompt`: there is a terminal at which somebody can be asked for a passphrase."""

    path: str
    may_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """One signature, judged. `principal` is set for a good one, `fingerprint` (`SHA256:...`) when
    there is a key, `reason` says why it is not good."""

    standing: Standing
    principal: str = ""
    fingerprint: str = ""
    algorithm: str = ""
    reason: str = ""


_UNSIGNED: Final = Verdict(Standing.NONE, reason="it has no signature")
_BEST_FIRST: Final = (Standing.GOOD, Standing.UNKNOWN, Standing.BAD, Standing.NONE)


# --- signing -------------------------------------------------------------------------------------


def sign(key: SigningKey, kind: Kind, oid: ObjectId) -> bytes:
    """The armoured signature of a commit or tag. It is checked before it is returned.

    Raises:
        SigningFailed: no such key, no passphrase and nobody to ask, the agent declined.
    """
    message = signed_message(kind, oid)
    program = shutil.which("ssh-keygen")
    if program is not None:
        armour = _sign_with_program(program, key, message)
    else:
        armour = _sign_with_library(key, message)
    reason = _misfit(armour, message)
    if reason:
        raise SigningFailed(f"{key.path} made a signature that is of no use: {reason}")
    return armour


def _sign_with_program(program: str, key: SigningKey, message: bytes) -> bytes:
    """`ssh-keygen -Y sign` over a file: only the names of files stand on its command line."""
    with tempfile.TemporaryDirectory(prefix="dm-sign-") as directory:
        path = os.path.join(directory, "message")
        with open(path, "wb") as file:
            file.write(message)
        argv = [program, "-q", "-Y", "sign", "-n", NAMESPACE, "-f", os.path.abspath(key.path), path]
        if not key.may_prompt:
            argv = ["/usr/bin/env", "SSH_ASKPASS_REQUIRE=never", *argv]
        try:
            done = subprocess.run(
                argv,
                stdin=None if key.may_prompt else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if key.may_prompt else subprocess.PIPE,
                # a session of its own has no terminal to open
                start_new_session=not key.may_prompt,
                timeout=None if key.may_prompt else SIGN_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise _failed(key, f"no answer within {SIGN_TIMEOUT_S:g} s") from None
        except OSError as exc:
            raise _failed(key, f"ssh-keygen cannot be run: {exc.strerror}") from exc
        if done.returncode != 0:
            raise _failed(key, _said(done.stderr or b""))
        with open(path + ".sig", "rb") as file:
            return file.read()


def _failed(key: SigningKey, why: str) -> SigningFailed:
    hint = "" if key.may_prompt else "a key with a passphrase must be in ssh-agent, or be asked for"
    return SigningFailed(
        f"cannot sign with {key.path}" + (f": {why}" if why else ""), hint=hint, key=key.path
    )


def _said(output: bytes) -> str:
    text = " ".join(output.decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() else "?" for c in text)[:_MESSAGE_CHARACTERS]


def _sign_with_library(key: SigningKey, message: bytes) -> bytes:
    import asyncssh

    try:
        private = asyncssh.read_private_key(key.path)
        return asyncssh.create_sshsig(private, message, namespace=NAMESPACE)
    except (OSError, ValueError, asyncssh.KeyEncryptionError) as exc:
        raise SigningFailed(
            f"cannot sign with {key.path}: {exc}",
            hint="ssh-keygen is not installed: only private key files without passphrase work",
            key=key.path,
        ) from exc


# --- judging -------------------------------------------------------------------------------------


def judge(
    store: SyncStore,
    dot: DotId,
    kind: Kind,
    oid: ObjectId,
    signers: Iterable[AllowedSigner],
    now_s: float,
) -> Verdict:
    """The best of what the signatures of a commit or tag say; `now_s` in seconds since 1970."""
    allowed = list(signers)
    verdicts = [
        judge_signature(armour, kind, oid, allowed, now_s)
        for armour in store.catalog.signatures(dot, oid)
    ]
    return min(verdicts, key=lambda v: _BEST_FIRST.index(v.standing), default=_UNSIGNED)


def judge_signature(
    armour: bytes,
    kind: Kind,
    oid: ObjectId,
    signers: Iterable[AllowedSigner],
    now_s: float,
) -> Verdict:
    """Does `armour` sign this commit or tag, and is its key allowed at `now_s`? Never raises for
    what the signature holds."""
    message = signed_message(kind, oid)
    try:
        signature = parse_signature(armour)
        fingerprint, certificate = _key_of(signature)
    except BadObject as exc:
        return Verdict(Standing.BAD, reason=exc.message)
    verdict = Verdict(Standing.BAD, "", fingerprint, signature.key_algorithm)
    reason = _misfit_of(signature, message)
    if reason:
        return _with(verdict, Standing.BAD, reason=reason)
    reasons = []
    for signer in signers:
        principal, reason = matches(signer, signature, certificate, now_s)
        if principal:
            return _with(verdict, Standing.GOOD, principal=principal)
        reasons.append(reason)
    reason = next(filter(None, reasons), "its key is not among the allowed signers")
    return _with(verdict, Standing.UNKNOWN, reason=reason)


def _with(verdict: Verdict, standing: Standing, principal: str = "", reason: str = "") -> Verdict:
    return Verdict(standing, principal, verdict.fingerprint, verdict.algorithm, reason)


def _key_of(signature: SshSignature) -> tuple[str, "SSHOpenSSHCertificate | None"]:
    """(fingerprint of the key, the certificate when the key is one). Raises BadObject."""
    import asyncssh
    from asyncssh.public_key import SSHOpenSSHCertificate

    line = signature.key_line
    try:
        if signature.is_certificate:
            certificate = asyncssh.import_certificate(line)
            assert isinstance(certificate, SSHOpenSSHCertificate), "by the name of its algorithm"
            return certificate.key.get_fingerprint(), certificate
        return asyncssh.import_public_key(line).get_fingerprint(), None
    except ValueError as exc:
        raise BadObject(f"the signature's key cannot be read: {exc}") from exc


def _misfit(armour: bytes, message: bytes) -> str:
    """Why the signature is not one of `message`, whoever made it; "" when it is."""
    try:
        signature = parse_signature(armour)
        _key_of(signature)
    except BadObject as exc:
        return exc.message
    return _misfit_of(signature, message)


def _misfit_of(signature: SshSignature, message: bytes) -> str:
    import asyncssh

    if signature.namespace != NAMESPACE:
        return f"it was made for another purpose ({signature.namespace!r:.40}, not {NAMESPACE!r})"
    _, certificate = _key_of(signature)
    key = certificate.key.export_public_key("openssh").decode() if certificate else ""
    anybody = b"* " + (key or signature.key_line).encode()
    try:
        fits = asyncssh.validate_sshsig(message, signature.blob, "anybody", anybody)
    except (ValueError, OverflowError) as exc:
        return f"it cannot be checked: {exc}"
    return "" if fits else "it does not fit what it should sign"
