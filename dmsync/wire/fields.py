"""Checked fields: how each value of a control frame is bounded and turned into its type.

A field turns a decoded msgpack value into a Python value (`parse`, raising ProtocolError for
anything a peer may not send) and back (`build`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Protocol

from dmsync.errors import ProtocolError

INT64_MAX: Final = 2**63 - 1


class Field(Protocol):
    def parse(self, value: Any) -> Any: ...

    def build(self, value: Any) -> Any: ...


def _refuse(what: str) -> ProtocolError:
    return ProtocolError(f"message field is not {what}")


@dataclass(frozen=True)
class Integer:
    """An integer in low..high."""

    high: int = INT64_MAX
    low: int = 0

    def parse(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise _refuse(f"an integer in {self.low}..{self.high}")
        return value

    def build(self, value: int) -> int:
        assert self.low <= value <= self.high, "own integer out of range"
        return int(value)


@dataclass(frozen=True)
class Flagged:
    """A truth value, on the wire 0 or 1."""

    def parse(self, value: Any) -> bool:
        if type(value) is not int or value not in (0, 1):
            raise _refuse("0 or 1")
        return bool(value)

    def build(self, value: bool) -> int:
        return int(value)


@dataclass(frozen=True)
class Choice:
    """A member of an IntEnum."""

    of: type[IntEnum]

    def parse(self, value: Any) -> IntEnum:
        if type(value) is not int:
            raise _refuse(f"a {self.of.__name__}")
        try:
            return self.of(value)
        except ValueError as exc:
            raise _refuse(f"a {self.of.__name__}") from exc

    def build(self, value: IntEnum) -> int:
        return int(value)


@dataclass(frozen=True)
class Bytes:
    """A byte string of `low`..`high` bytes."""

    high: int
    low: int = 0

    def parse(self, value: Any) -> bytes:
        if type(value) is not bytes or not self.low <= len(value) <= self.high:
            raise _refuse(f"{self.low} to {self.high} bytes")
        return value

    def build(self, value: bytes) -> bytes:
        return bytes(value)


def exactly(length: int) -> Bytes:
    return Bytes(length, length)


@dataclass(frozen=True)
class Text:
    """UTF-8 text of at most `high` characters."""

    high: int

    def parse(self, value: Any) -> str:
        if type(value) is not str or len(value) > self.high:
            raise _refuse(f"text of at most {self.high} characters")
        return value

    def build(self, value: str) -> str:
        return value[: self.high].encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Checked:
    """Text that a check accepts, such as a ref name."""

    accepts: Callable[[str], bool]
    what: str

    def parse(self, value: Any) -> str:
        if type(value) is not str or not self.accepts(value):
            raise _refuse(self.what)
        return value

    def build(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Optional:
    """nil or a field."""

    of: Field

    def parse(self, value: Any) -> Any:
        return None if value is None else self.of.parse(value)

    def build(self, value: Any) -> Any:
        return None if value is None else self.of.build(value)


@dataclass(frozen=True)
class Array:
    """An array of at most `high` items of one field."""

    of: Field
    high: int

    def parse(self, value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > self.high:
            raise _refuse(f"an array of at most {self.high}")
        return tuple(self.of.parse(item) for item in value)

    def build(self, value: Any) -> tuple[Any, ...]:
        assert len(value) <= self.high, "own array over its limit"
        return tuple(self.of.build(item) for item in value)


@dataclass(frozen=True)
class Tuple:
    """A fixed-length array of different fields; `make` turns it into its class. The last one may
    be left out when it `has_optional`, which stands for nil."""

    of: tuple[Field, ...]
    make: Callable[..., Any] | None = None
    names: tuple[str, ...] = ()
    has_optional: bool = False

    def parse(self, value: Any) -> Any:
        if type(value) is tuple and self.has_optional and len(value) == len(self.of) - 1:
            value = (*value, None)
        if type(value) is not tuple or len(value) != len(self.of):
            raise _refuse(f"an array of {len(self.of)}")
        parts = tuple(field.parse(item) for field, item in zip(self.of, value, strict=True))
        return parts if self.make is None else self.make(*parts)

    def build(self, value: Any) -> tuple[Any, ...]:
        parts = [getattr(value, name) for name in self.names] if self.names else value
        built = tuple(field.build(part) for field, part in zip(self.of, parts, strict=True))
        return built[:-1] if self.has_optional and built[-1] is None else built
