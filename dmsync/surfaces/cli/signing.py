"""Signing and showing signatures: what `dm commit`, `dm tag`, `dm log` and `dm show` share."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import FILE_NAME, Invocation

if TYPE_CHECKING:
    from dmsync.core.ids import DotId, Kind, ObjectId
    from dmsync.engine.allowed_signers import AllowedSigner
    from dmsync.engine.signatures import SigningKey, Verdict
    from dmsync.engine.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])


# --- signing -------------------------------------------------------------------------------------


def key_option(command: Command) -> Command:
    """`--signing-key FILE`, as the argument `key`."""
    option = click.option(
        "--signing-key",
        "key",
        type=FILE_NAME,
        metavar="FILE",
        help="The key to sign with (private, or public when an agent has it); implies signing.",
    )
    return option(command)


def signing_options(command: Command) -> Command:
    """`-S` and `--signing-key`, as the arguments `is_signed` and `key`."""
    option = click.option(
        "-S", "--sign", "is_signed", is_flag=True, help="Sign it with your SSH key."
    )
    return option(key_option(command))


def signing_key(invocation: Invocation, given: str | None, *, wanted: bool) -> "SigningKey | None":
    """The key to sign with: the one given, else the configured one; None when none is wanted.

    Raises:
        UsageError: a signature is wanted and there is no key.
    """
    if not wanted and given is None:
        return None
    from dmsync.engine.signatures import SigningKey

    path = given or invocation.settings.engine.signing_key
    if path is None:
        raise UsageError(
            "no key to sign with",
            hint="give --signing-key FILE, or set signing-key under [user] in the configuration",
        )
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise UsageError(f"no key {path}", hint="a private key, or its .pub with ssh-agent")
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and not invocation.assume_yes
    return SigningKey(path, may_prompt=is_terminal)


# --- showing -------------------------------------------------------------------------------------


def allowed_signers(
    invocation: Invocation, given: str | None = None
) -> "tuple[AllowedSigner, ...] | None":
    """The allowed signers of the file given, else of the configured one; None without one.

    Raises:
        ConfigError: the file cannot be read.
    """
    from dmsync.engine.allowed_signers import read_allowed_signers

    path = given or invocation.settings.engine.allowed_signers
    return None if path is None else read_allowed_signers(os.path.expanduser(path))


class SignatureReader:
    """Judges signatures of one dot against the configured signers, read once."""

    def __init__(
        self, store: "Store", dot: "DotId", signers: "Sequence[AllowedSigner] | None"
    ) -> None:
        self._store = store
        self._dot = dot
        self._signers = signers

    def of_commit(self, oid: "ObjectId") -> "Verdict":
        from dmsync.core.ids import Kind

        return self.verdict(Kind.COMMIT, oid)

    def verdict(self, kind: "Kind", oid: "ObjectId") -> "Verdict":
        from dataclasses import replace

        from dmsync.engine.signatures import Standing, judge

        now_s = self._store.clock()[0] / 1_000_000_000
        verdict = judge(self._store, self._dot, kind, oid, self._signers or (), now_s)
        if self._signers is None and verdict.standing is Standing.UNKNOWN:
            return replace(verdict, reason="no allowed signers are configured")
        return verdict


def signature_reader(invocation: Invocation, store: "Store", dot: "DotId") -> SignatureReader:
    """With the configured signers."""
    return SignatureReader(store, dot, allowed_signers(invocation))


def verdict_text(verdict: "Verdict") -> str:
    """`good, by ada@example.org with ED25519 SHA256:...`."""
    text = verdict.standing.replace("-", " ")
    if verdict.principal:
        text += f", by {output.escape_name(verdict.principal)}"
    if verdict.fingerprint:
        text += f" with {verdict.algorithm} {verdict.fingerprint}"
    return f"{text}: {output.escape_line(verdict.reason)}" if verdict.reason else text


def verdict_fields(verdict: "Verdict") -> dict[str, object]:
    """JSON of a verdict."""
    return {
        "status": verdict.standing.value,
        "principal": verdict.principal or None,
        "fingerprint": verdict.fingerprint or None,
        "algorithm": verdict.algorithm or None,
        "reason": verdict.reason or None,
    }
