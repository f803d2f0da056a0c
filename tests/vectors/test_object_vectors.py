"""Replays protocol/vectors/objects: each accepted object keeps its id, each bad one is refused."""

import json
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, object_id
from dmsync.core.objects import commit_from_bytes, tag_from_bytes
from dmsync.core.pages import DIRECTORY, MANIFEST, decode_page, encode_page
from dmsync.errors import BadObject

CASES = sorted((Path(__file__).parents[2] / "protocol/vectors/objects").glob("*.json"))


def decode_and_encode(kind: Kind, data: bytes) -> bytes:
    """Decode as a peer's bytes and encode again. Raises BadObject."""
    if kind is Kind.COMMIT:
        return commit_from_bytes(data).to_bytes()
    if kind is Kind.TAG:
        return tag_from_bytes(data).to_bytes()
    if kind is Kind.PAGE:
        page_type = MANIFEST if data[1:2] == b"\x02" else DIRECTORY
        return encode_page(decode_page(data, page_type))
    return data


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_object_vector(path: Path) -> None:
    case = json.loads(path.read_text())
    kind, data = Kind[case["kind"]], bytes.fromhex(case["bytes"])
    if case["expect"] == "refused":
        with pytest.raises(BadObject):
            decode_and_encode(kind, data)
    else:
        assert decode_and_encode(kind, data) == data
        assert object_id(kind, data).hex() == case["id"]


def test_there_are_vectors() -> None:
    assert len(CASES) >= 35
