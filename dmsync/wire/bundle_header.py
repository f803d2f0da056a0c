"""The header of a bundle file (protocol/BUNDLE.md)."""

from dataclasses import dataclass, fields
from typing import Any, Final

from dmsync.core.encoding import ITEMS_MAX, decode, encode
from dmsync.core.ids import DOT_ID_BYTES, ID_BYTES, DotId, ObjectId
from dmsync.errors import BadBundle, BadObject, FormatUnsupported, ProtocolError
from dmsync.wire import limits
from dmsync.wire.fields import Array, Checked, Field, Integer, Optional, Text, Tuple, exactly
from dmsync.wire.messages import RefValue, is_plain_name, is_ref_name

BUNDLE_MAGIC: Final = b"\x89DMB\r\n\x1a\n"
BUNDLE_CONTEXT: Final = "dmsync 2026-11-21 bundle v1"
"""Of the hash that ends the file."""
BUNDLE_VERSION: Final = 1
_CLUSTER_ID_BYTES: Final = 16
_FEATURES_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class BundleHeader:
    """What a bundle is about. `prerequisites` must be held, with content, by who applies it;
    `hollow_count` of the commits come by their record alone."""

    cluster_id: bytes
    epoch: int
    seq: int
    dot: DotId
    namespace: str
    name: str
    head: str | None
    refs: tuple[RefValue, ...]
    prerequisites: tuple[ObjectId, ...]
    commits_count: int
    hollow_count: int
    records_count: int

    def to_bytes(self) -> bytes:
        """The canonical value, without its length."""
        names = [field.name for field in fields(self)]
        built = tuple(f.build(getattr(self, n)) for f, n in zip(_FIELDS, names, strict=True))
        return encode((BUNDLE_VERSION, (), *built))


def _is_name(text: str) -> bool:
    return is_plain_name(text) and len(text) <= limits.NAME_CHARS_MAX


_NAME: Final = Checked(_is_name, "a name")
_OID: Final = exactly(ID_BYTES)
_REF: Final = Tuple(
    (Checked(is_ref_name, "a ref name"), _OID, Optional(_NAME), Optional(_OID)),
    RefValue,
    ("name", "id", "origin", "peeled"),
    has_optional=True,
)
_FIELDS: Final[tuple[Field, ...]] = (
    exactly(_CLUSTER_ID_BYTES),
    Integer(),
    Integer(),
    exactly(DOT_ID_BYTES),
    Checked(lambda text: not text or _is_name(text), "a namespace"),
    _NAME,
    Optional(_NAME),
    Array(_REF, limits.BUNDLE_REFS_MAX),
    Array(_OID, limits.FRONTIER_MAX),
    Integer(),
    Integer(),
    Integer(),
)
_FEATURE: Final = Text(limits.NAME_CHARS_MAX)


def header_from_bytes(data: bytes) -> BundleHeader:
    """Build a checked header.

    Raises:
        FormatUnsupported: a version or feature of a newer dmsync. BadBundle: anything else.
    """
    try:
        return _header(decode(data, items_max=ITEMS_MAX))
    except (BadObject, ProtocolError) as exc:
        raise BadBundle(f"the header is no bundle header: {exc.message}") from exc


def _header(value: Any) -> BundleHeader:
    if type(value) is not tuple or len(value) < 2 or type(value[0]) is not int:
        raise BadObject("not an array that begins with a version")
    if value[0] != BUNDLE_VERSION:
        raise FormatUnsupported(f"bundle version {value[0]} is of a newer dmsync")
    features = Array(_FEATURE, _FEATURES_MAX).parse(value[1])
    if features:
        raise FormatUnsupported(f"the bundle needs the feature {features[0]}")
    header: BundleHeader = Tuple(_FIELDS, BundleHeader).parse(value[2:])
    for ref in header.refs:
        if not ref.name.startswith(("branch/", "tag/")):
            raise BadObject("a ref that is no branch or tag")
    return header
