"""Errors on the wire: a stable code becomes the same typed error on the other side (WIRE.md 6)."""

import json
from typing import Any, Final

from dmsync import errors
from dmsync.wire.messages import Failure

_NEVER_FROM_A_PEER: Final = frozenset({"interrupted", "usage", "config", "nothing-to-do"})
"""Codes that would make this command's exit code say something about this side."""


def _subclasses(cls: type[errors.DmError]) -> list[type[errors.DmError]]:
    below = cls.__subclasses__()
    return below + [deeper for child in below for deeper in _subclasses(child)]


def _classes_by_code() -> dict[str, type[errors.DmError]]:
    return {cls.code: cls for cls in _subclasses(errors.DmError)}


def _json_safe(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return str(value)


def printable(text: str) -> str:
    """Peer text without control characters, safe for a terminal. Newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def failure_from_error(error: errors.DmError) -> Failure:
    """The ERROR frame that reports `error` to the peer."""
    facts = json.dumps({key: _json_safe(value) for key, value in error.facts.items()})
    if len(facts) > 32 * 1024:
        facts = "{}"
    return Failure(error.code, error.message, error.hint, facts, error.retryable)


def error_from_failure(failure: Failure) -> errors.DmError:
    """The typed error that a peer's ERROR frame stands for; RemoteFailure for unknown codes."""
    facts: dict[str, Any] = {}
    try:
        parsed = json.loads(failure.facts_json)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        facts = {k: v for k, v in parsed.items() if k.isidentifier() and k not in _RESERVED}
    message, hint = printable(failure.message), printable(failure.hint)
    return error_from_code(failure.code, message, hint=hint, facts=facts)


def error_from_code(
    code: str, message: str, *, hint: str = "", facts: dict[str, Any] | None = None
) -> errors.DmError:
    """A typed error by its stable code."""
    cls = _classes_by_code().get(code)
    if cls is None or code in _NEVER_FROM_A_PEER:
        return errors.RemoteFailure(message, hint=hint, remote_code=code, **(facts or {}))
    return cls(message, hint=hint, **(facts or {}))


_RESERVED: Final = frozenset({"self", "message", "hint", "remote_code"})
