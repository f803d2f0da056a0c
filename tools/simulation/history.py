"""What was asked for and what became of it, as those who asked saw it."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from dmsync.core.ids import ObjectId

Result = Literal["running", "ok", "failed", "unknown"]
"""`failed`: refused for good, nothing changed; `unknown`: it may have happened or not."""


@dataclass(frozen=True)
class Promise:
    """Something that was acknowledged: on `machine`, the operation `op_id` moved (or, `new` None,
    deleted) a ref."""

    machine: str
    ref: str
    old: ObjectId | None
    new: ObjectId | None
    op_id: bytes | None = None


@dataclass
class Invocation:
    """One step. `facts` are what the checks need to know about what was asked."""

    number: int
    machine: str
    verb: str
    began_s: float
    facts: dict[str, Any] = field(default_factory=dict)
    result: Result = "running"
    error: str = ""
    ended_s: float = 0.0
    promises: list[Promise] = field(default_factory=list)

    def line(self) -> str:
        facts = " ".join(f"{name}={_shown(value)}" for name, value in self.facts.items())
        promised = " ".join(f"{p.ref}->{_shown(p.new)}" for p in self.promises)
        return (
            f"{self.began_s:10.3f}-{self.ended_s:10.3f} #{self.number} {self.machine} {self.verb} "
            f"{facts}: {self.result} {self.error} {promised}".rstrip()
        )


def _shown(value: Any) -> str:
    return value.hex()[:8] if isinstance(value, bytes) else os.fsdecode(str(value))
