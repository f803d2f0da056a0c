"""SSH keys that sign, made and used by the stock ssh-keygen."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Signer:
    """A key pair: `path` and `path`.pub; `public` is the line without a comment."""

    path: Path

    @property
    def public(self) -> str:
        return " ".join(self.path.with_name(self.path.name + ".pub").read_text().split()[:2])

    @property
    def certificate(self) -> Path:
        return self.path.with_name(self.path.name + "-cert.pub")


def ssh_keygen(
    *arguments: str | Path, stdin: bytes = b"", check: bool = True
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["ssh-keygen", *map(str, arguments)], input=stdin, capture_output=True, check=check
    )


def make_signer(directory: Path, name: str, kind: str = "ed25519", passphrase: str = "") -> Signer:
    path = directory / name
    options = ["-b", "2048"] if kind == "rsa" else []
    ssh_keygen("-q", "-t", kind, *options, "-N", passphrase, "-C", name, "-f", path)
    return Signer(path)


def certify(authority: Signer, signer: Signer, principals: Sequence[str], *options: str) -> None:
    """Write the signer's certificate beside its key."""
    named = ("-n", ",".join(principals)) if principals else ()
    public = signer.path.with_name(signer.path.name + ".pub")
    ssh_keygen("-q", "-s", authority.path, "-I", "test", *named, *options, public)


def sign_stock(signer: Signer, message: bytes, namespace: str = "dm") -> bytes:
    """The armoured signature as `ssh-keygen -Y sign` makes it."""
    return ssh_keygen("-q", "-Y", "sign", "-n", namespace, "-f", signer.path, stdin=message).stdout


def verify_stock(
    allowed: Path, principal: str, armour: bytes, message: bytes, namespace: str = "dm"
) -> bool:
    """What `ssh-keygen -Y verify` says."""
    signature = allowed.with_name("checked.sig")
    signature.write_bytes(armour)
    done = ssh_keygen(
        "-Y", "verify", "-n", namespace, "-f", allowed, "-I", principal, "-s", signature,
        stdin=message, check=False,
    )  # fmt: skip
    return done.returncode == 0
