"""Every error dmsync raises on purpose: a stable code, an exit code and the facts.

Errors are raised with facts, translated once at each boundary, and printed only by a surface.
Exit codes are the contract of the command (README, "Exit codes"); `code` is stable for scripts
and for the wire (protocol/errors.toml lists them all; a test compares).
"""

from typing import ClassVar


class DmError(Exception):
    """Base of all expected failures. `facts` are JSON-safe values for machine output."""

    code: ClassVar[str] = "failure"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts


# --- 2: the command was used wrongly ---------------------------------------------------------


class UsageError(DmError):
    """Arguments that cannot mean anything: bad names, contradicting options."""

    code = "usage"
    exit_code = 2


class InvalidName(UsageError):
    code = "invalid-name"


class ConfigError(UsageError):
    """A configuration file or variable that cannot be read as what it should be."""

    code = "config"


# --- 4, 10: nothing there ----------------------------------------------------------------------


class NothingToDo(DmError):
    code = "nothing-to-do"
    exit_code = 4


class NotFound(DmError):
    """No store, dot, branch, commit, path, remote or transfer of that name."""

    code = "not-found"
    exit_code = 10


class StoreNotFound(NotFound):
    code = "no-store"


class DotNotFound(NotFound):
    code = "no-dot"


class RevisionNotFound(NotFound):
    code = "no-revision"


class AmbiguousRevision(NotFound):
    code = "ambiguous-revision"


class RemoteNotFound(NotFound):
    code = "no-remote"


class PathNotFound(NotFound):
    code = "no-path"


class ContentAbsent(NotFound):
    """Only the record of a commit is here: its content was never fetched, or was pruned."""

    code = "content-absent"

    @classmethod
    def of_commit(cls, commit: bytes) -> "ContentAbsent":
        """For whoever reads a commit, or gives it a name, whose content is not here."""
        return cls(
            f"the content of commit {commit.hex()[:12]} is not here, only its record",
            hint="dm fetch REMOTE --deepen N or --unshallow brings it, if the remote has it",
            commit=commit.hex(),
        )


class AlreadyExists(DmError):
    code = "exists"


class FormatUnsupported(DmError):
    """The store was written by a newer dmsync, or needs a feature this one lacks."""

    code = "format-unsupported"


class StorageFull(DmError):
    code = "no-space"
    retryable = True


class QuotaExceeded(DmError):
    """What a namespace may take on the server is used up."""

    code = "quota"


class StorageFailed(DmError):
    """The operating system refused a read or write of the store (not a full disk)."""

    code = "storage"


# --- 12, 13: the other side --------------------------------------------------------------------


class AccessDenied(DmError):
    """Authentication failed or the peer may not do this."""

    code = "denied"
    exit_code = 12


class HostKeyRejected(AccessDenied):
    code = "host-key"


class NetworkError(DmError):
    """The connection could not be made or broke; worth trying again."""

    code = "network"
    exit_code = 13
    retryable = True


class NotADmServer(DmError):
    """Something answered, but not a dm server."""

    code = "not-a-dm-server"
    exit_code = 13


class ProtocolError(DmError):
    """The peer broke the rules of dmsync/1: frame, order, limit or encoding."""

    code = "protocol"
    exit_code = 13


class VersionMismatch(ProtocolError):
    code = "version"


class RemoteFailure(DmError):
    """The remote reported an error this side has no type for."""

    code = "remote-failure"


# --- 14: history ----------------------------------------------------------------------------------


class Diverged(DmError):
    """Both sides hold commits the other lacks."""

    code = "diverged"
    exit_code = 14


class NotFastForward(Diverged):
    """The target has commits the source lacks (it is ahead)."""

    code = "not-fast-forward"


class UnrelatedHistories(Diverged):
    code = "unrelated"


class RemoteRewound(DmError):
    """The remote's log is shorter than it was: restored from an old copy, or tampered with."""

    code = "rewound"
    exit_code = 14


class RefConflict(DmError):
    """A ref moved between being read and being changed."""

    code = "ref-conflict"
    exit_code = 14
    retryable = True


class DotIdClash(DmError):
    """The same name stands for different dots, or one dot already has another name here."""

    code = "dot-id-clash"


# --- 15: merging ---------------------------------------------------------------------------------


class MergeConflict(DmError):
    """Something in a merge must be decided by the user; nothing was lost or committed."""

    code = "merge-conflict"
    exit_code = 15


# --- 16..18, 75 ----------------------------------------------------------------------------------


class Corruption(DmError):
    """Stored bytes are not what was stored. Never retried, never hidden."""

    code = "corruption"
    exit_code = 16


class ObjectMissing(Corruption):
    code = "object-missing"


class HashMismatch(Corruption):
    code = "hash-mismatch"


class BadObject(Corruption):
    """Bytes that are no valid object: not canonical, out of bounds, unsafe name."""

    code = "bad-object"


class CaptureFailed(DmError):
    """The tree could not be read as one state: hook failed, tree moved, another filesystem."""

    code = "capture"
    exit_code = 17


class BadBundle(Corruption):
    """A bundle file that is truncated, changed, or no bundle."""

    code = "bad-bundle"


class BadSignature(DmError):
    """A signature that does not fit, or whose key is not allowed."""

    code = "bad-signature"


class SigningFailed(DmError):
    """No signature could be made: no key, no passphrase, or the agent declined."""

    code = "signing"


class DriverFailed(DmError):
    """A diff or merge command of the user's configuration failed, or took too long."""

    code = "driver"


class WouldLose(DmError):
    """Refused because uncommitted changes would go, or something uses the dot."""

    code = "would-lose"
    exit_code = 18


class CannotUndo(DmError):
    """What an operation did cannot be taken back: something moved since, or it is final."""

    code = "cannot-undo"
    exit_code = 18


class Busy(DmError):
    """Another process holds the lock; try again later."""

    code = "busy"
    exit_code = 75
    retryable = True


class Exhausted(DmError):
    """The machine gave this process too little of something that is no disk: try again later."""

    code = "no-resources"
    exit_code = 75
    retryable = True


class Interrupted(DmError):
    code = "interrupted"
    exit_code = 130
