"""What a server refused to whom, for its operator: one line of the log `dmsync.audit` each.

What was done stands in the event log, with its actor; what was refused changed nothing, so it
stands here only. Names come from a peer: control characters are escaped. The surface that serves
decides where the lines go and how many of them are too many.
"""

import logging
from typing import Final

from dmsync.core.names import full_name
from dmsync.engine.ports import Access
from dmsync.wire.failures import printable

AUDIT: Final = logging.getLogger("dmsync.audit")
_FIELD_CHARACTERS_MAX: Final = 200


def note_refusal(access: Access, verb: str, namespace: str, name: str, why: str) -> None:
    """Say that a logged-in peer was refused `verb` on the dot namespace/name."""
    note("refused", who=access.actor, source=access.address, verb=verb,
         dot=full_name(namespace, name), why=why)  # fmt: skip


def note(what: str, *, who: str, source: str, key: str | None = None, **details: str) -> None:
    """One line: `what` user=... key=... from=... and details, each without control characters.

    `who`: a user, and the fingerprint of a key behind a space, unless that is given as `key`: a
    user that a peer made up may have spaces.
    """
    user, _, last = who.partition(" ") if key is None else (who, "", key)
    fields = {"user": user, "key": last, "from": source, **details}
    words = (f"{label}={_field(value)}" for label, value in fields.items() if value)
    AUDIT.warning("%s %s", what, " ".join(words))


def _field(value: str) -> str:
    """One word: white space, quotes and control characters are escaped or quoted."""
    safe = printable(value[:_FIELD_CHARACTERS_MAX]).replace("\n", "\\x0a").replace('"', "\\x22")
    return f'"{safe}"' if " " in safe else safe
