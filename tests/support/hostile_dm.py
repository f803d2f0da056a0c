"""`dm` with one rule broken, to play the hostile peer: hostile_dm.py MODE ARGUMENT...

Everything else is the real program, so that a peer meets the broken rule and nothing but it.

Modes: `dotdot` writes entries named `dotdot` as `..`; `slash` those named `slash` as `../slash`;
`flip` damages the records it sends; `truncate` leaves out half of each frame of records; `oversize` announces
a frame of 2 GiB; `garbage` sends noise where a frame should start.
"""

import sys
from collections.abc import Callable

from dmsync.core import objects
from dmsync.surfaces.cli.main import main
from dmsync.wire import connection
from dmsync.wire.frames import HEADER, Frame, FrameType, encode_frame

Encode = Callable[[Frame], bytes]


def accept_name(name: bytes) -> None:
    """Instead of the check."""


def write_entries_as(written: bytes, name: bytes) -> None:
    """Store every entry called `name` as `written`, and check no names."""
    honest = objects.Entry.to_value

    def to_value(entry: objects.Entry) -> tuple[object, ...]:
        value = honest(entry)
        return (written, *value[1:]) if entry.name == name else value

    setattr(objects.Entry, "to_value", to_value)  # noqa: B010 (a method of a typed class)
    objects.check_name = accept_name


def flip(frame: Frame) -> bytes:
    """Records with a wrong last byte."""
    encoded = encode_frame(frame)
    if frame.type is not FrameType.RECORDS:
        return encoded
    return encoded[:-1] + bytes([encoded[-1] ^ 1])


def truncate(frame: Frame) -> bytes:
    """Half of a frame of records; what comes after it is taken for its rest."""
    encoded = encode_frame(frame)
    return encoded[: len(encoded) // 2] if frame.type is FrameType.RECORDS else encoded


def oversize(frame: Frame) -> bytes:
    """A header that promises 2 GiB of records."""
    if frame.type is not FrameType.RECORDS:
        return encode_frame(frame)
    return HEADER.pack(2**31, frame.type, 0) + frame.payload


def garbage(frame: Frame) -> bytes:
    """Noise instead of records."""
    return encode_frame(frame) if frame.type is not FrameType.RECORDS else b"\xff" * 4096


FRAME_MODES: dict[str, Encode] = {
    "flip": flip,
    "truncate": truncate,
    "oversize": oversize,
    "garbage": garbage,
}


def break_one_rule(mode: str) -> None:
    """Change this process for `mode`."""
    if mode == "dotdot":
        write_entries_as(b"..", b"dotdot")
    elif mode == "slash":
        write_entries_as(b"../slash", b"slash")
    else:
        assert hasattr(connection, "encode_frame"), "the frames are encoded elsewhere now"
        connection.encode_frame = FRAME_MODES[mode]


if __name__ == "__main__":
    break_one_rule(sys.argv[1])
    del sys.argv[1]
    sys.exit(main())
