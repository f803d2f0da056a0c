"""The parts of an SSHSIG, the signature format of OpenSSH (its PROTOCOL.sshsig).

Whatever comes in may be hostile: each part is bounded and checked before anything looks at it.
"""

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from typing import Final

from dmsync.errors import BadObject

NAMESPACE: Final = "dm"
"""What dm's signatures are made for: one of another namespace never counts."""
ARMOUR_BYTES_MAX: Final = 16 * 1024
CERTIFICATE_SUFFIX: Final = "-cert-v01@openssh.com"

_ARMOUR: Final = re.compile(
    rb"\s*-----BEGIN SSH SIGNATURE-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END SSH SIGNATURE-----\s*"
)
_MAGIC: Final = b"SSHSIG"
_HASHES: Final = (b"sha256", b"sha512")
_RSA_ALGORITHMS: Final = ("rsa-sha2-256", "rsa-sha2-512")
"""RSA with SHA-1 is broken; what a key of another kind signs with is fixed by its kind."""


@dataclass(frozen=True, slots=True)
class SshSignature:
    """A parsed signature, which need not fit anything. `blob` is all of it without the armour."""

    blob: bytes
    public_key: bytes
    key_algorithm: str
    namespace: str

    @property
    def is_certificate(self) -> bool:
        return self.key_algorithm.endswith(CERTIFICATE_SUFFIX)

    @property
    def key_line(self) -> str:
        """The key as in a .pub file, without comment."""
        return f"{self.key_algorithm} {b64encode(self.public_key).decode()}"


def parse_signature(armour: bytes) -> SshSignature:
    """Take an armoured signature apart. Raises BadObject."""
    if len(armour) > ARMOUR_BYTES_MAX:
        raise BadObject(f"the signature is longer than {ARMOUR_BYTES_MAX} bytes")
    match = _ARMOUR.fullmatch(armour)
    if match is None:
        raise BadObject("not an armoured SSH signature")
    try:
        blob = b64decode(b"".join(match[1].split()), validate=True)
    except Base64Error as exc:
        raise BadObject("the signature's base64 is damaged") from exc
    if blob[:6] != _MAGIC or blob[6:10] != b"\x00\x00\x00\x01":
        raise BadObject("not an SSH signature of version 1")
    public_key, rest = _string(blob[10:])
    namespace, rest = _string(rest)
    reserved, rest = _string(rest)
    hash_name, rest = _string(rest)
    signed, rest = _string(rest)
    if rest or reserved:
        raise BadObject("the signature has bytes where none belong")
    if hash_name not in _HASHES:
        raise BadObject("the signature uses a hash that is not allowed")
    key_algorithm = _algorithm(_string(public_key)[0])
    _check_algorithms(key_algorithm, _algorithm(_string(signed)[0]))
    return SshSignature(blob, public_key, key_algorithm, namespace.decode("utf-8", "replace"))


def _string(data: bytes) -> tuple[bytes, bytes]:
    """(an SSH string, what follows it)."""
    end = 4 + int.from_bytes(data[:4], "big")
    if len(data) < 4 or end > len(data):
        raise BadObject("the signature is cut short")
    return data[4:end], data[end:]


def _algorithm(name: bytes) -> str:
    if not re.fullmatch(rb"[a-z0-9@.-]{1,64}", name):
        raise BadObject("the signature names no known kind of key")
    return name.decode("ascii")


def _check_algorithms(key: str, signed_with: str) -> None:
    plain = key.replace(CERTIFICATE_SUFFIX, "@openssh.com" if key.startswith("sk-") else "")
    if plain == "ssh-rsa":
        if signed_with not in _RSA_ALGORITHMS:
            raise BadObject(f"RSA signatures by {signed_with} are not accepted")
    elif plain == "ssh-dss" or signed_with != plain:
        raise BadObject(f"signatures by {signed_with} with a key of {plain} are not accepted")
