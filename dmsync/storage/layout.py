"""Where everything in a store lies; making, opening and refusing one (protocol/STORE.md 1-2)."""

import json
import os
import stat
from typing import Any, Final

from dmsync.core.events import Operation, StoreCreated
from dmsync.core.ids import DotId
from dmsync.core.values import plain_value_type
from dmsync.errors import (
    AccessDenied,
    AlreadyExists,
    Corruption,
    FormatUnsupported,
    StorageFailed,
    StoreNotFound,
)
from dmsync.storage.durable import fsync_directory, make_directory_durable, write_file_atomic
from dmsync.storage.event_log import START, EventLog
from dmsync.storage.holds import HOLD_FILE
from dmsync.storage.locks import FileLock
from dmsync.storage.reserve import make_reserve

FORMAT_VERSION: Final = 1
FEATURES_KNOWN: Final[frozenset[str]] = frozenset()
"""Features this release understands beyond version 1 (none yet)."""
_FORMAT_BYTES_MAX: Final = 64 * 1024
_FEATURE_SETS: Final = ("compatible", "read_only_compatible", "incompatible")


@plain_value_type
class Format:
    """What the file `format` says. Unknown compatible features are ignored; unknown
    read-only-compatible ones forbid writing; unknown incompatible ones forbid everything."""

    version: int
    compatible: tuple[str, ...] = ()
    read_only_compatible: tuple[str, ...] = ()
    incompatible: tuple[str, ...] = ()

    def check(self, *, writing: bool) -> None:
        """Raise FormatUnsupported, naming what is missing, unless this release may go on."""
        if self.version > FORMAT_VERSION:
            raise FormatUnsupported(
                f"the store has format {self.version}; this dmsync understands {FORMAT_VERSION}",
                hint="use a newer dmsync",
                version=self.version,
            )
        demanded = self.incompatible + (self.read_only_compatible if writing else ())
        for feature in demanded:
            if feature not in FEATURES_KNOWN:
                doing = "write to" if feature in self.read_only_compatible else "open"
                raise FormatUnsupported(
                    f"the store uses the feature {feature!r}, needed to {doing} it",
                    hint="use a newer dmsync",
                    feature=feature,
                )

    def to_bytes(self) -> bytes:
        value = {
            "version": self.version,
            "compatible": list(self.compatible),
            "read_only_compatible": list(self.read_only_compatible),
            "incompatible": list(self.incompatible),
        }
        return json.dumps(value).encode() + b"\n"


def parse_format(data: bytes, path: str) -> Format:
    """Read the bytes of a format file. Keys this release does not know are ignored.

    Raises:
        Corruption: not such a file.
    """
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _damaged_format(path) from exc
    if not isinstance(value, dict) or type(value.get("version")) is not int:
        raise _damaged_format(path)
    features: list[tuple[str, ...]] = []
    for name in _FEATURE_SETS:
        listed = value.get(name, [])
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise _damaged_format(path)
        features.append(tuple(listed))
    return Format(value["version"], *features)


def _damaged_format(path: str) -> Corruption:
    return Corruption(f"{path} is damaged", hint="dm fsck --repair writes it again", path=path)


class Layout:
    """All paths of the store at `home`. Makes and checks nothing by itself."""

    def __init__(self, home: str) -> None:
        self.home = os.path.abspath(home)
        self.format_file = os.path.join(self.home, "format")
        self.lock_file = os.path.join(self.home, "lock")
        self.events_dir = os.path.join(self.home, "events")
        self.log_lock_file = os.path.join(self.events_dir, "lock")
        self.catalog_file = os.path.join(self.home, "catalog.sqlite")
        self.dots_dir = os.path.join(self.home, "dots")
        self.trash_dir = os.path.join(self.home, "trash")
        self.transfers_dir = os.path.join(self.home, "transfers")
        self.damaged_dir = os.path.join(self.home, "damaged")
        self.losses_file = os.path.join(self.damaged_dir, "lost")
        self.temporary_dir = os.path.join(self.home, "tmp")
        self.collecting_lock_file = os.path.join(self.home, "gc.lock")
        self.reserve_file = os.path.join(self.home, "reserve")

    def transfer_lock_file(self, transfer: bytes) -> str:
        """Locked as long as the transfer runs (a ProofOfLife)."""
        return os.path.join(self.transfers_dir, f"{transfer.hex()}.lock")

    def dot_dir(self, dot: DotId) -> str:
        return os.path.join(self.dots_dir, dot.hex())

    def packs_dir(self, dot: DotId) -> str:
        return os.path.join(self.dot_dir(dot), "packs")

    def quarantine_dir(self, dot: DotId) -> str:
        return os.path.join(self.dot_dir(dot), "quarantine")

    def dot_lock_file(self, dot: DotId) -> str:
        return os.path.join(self.dot_dir(dot), "lock")

    def hold_file(self, dot: DotId) -> str:
        """Shared by who relies on stored objects, exclusive to a sweep (storage.holds)."""
        return os.path.join(self.dot_dir(dot), HOLD_FILE)

    def trees_dir(self, dot: DotId) -> str:
        return os.path.join(self.dot_dir(dot), "trees")

    def tree_dir(self, dot: DotId, branch: str) -> str:
        """The managed working tree of a branch; `branch` has been checked as a name."""
        return os.path.join(self.trees_dir(dot), branch)

    def stat_cache_file(self, dot: DotId, branch: str) -> str:
        return os.path.join(self.dot_dir(dot), "stat", f"{branch}.stat")

    def trashed_dot_dir(self, trash: str) -> str:
        """`trash` is `<dot id>-<n>`, as DotDeleted says it."""
        return os.path.join(self.trash_dir, trash)

    def make_dot_dirs(self, dot: DotId) -> None:
        """The empty directories of a new dot, durable on return. May be repeated."""
        make_directory_durable(self.dots_dir)
        for path in (
            self.dot_dir(dot),
            self.packs_dir(dot),
            self.quarantine_dir(dot),
            self.trees_dir(dot),
            os.path.join(self.dot_dir(dot), "stat"),
        ):
            make_directory_durable(path)

    def holds_something(self) -> bool:
        """Is there more than an attempt to make a store leaves: dots, or a catalog of them?"""
        try:
            return os.path.isfile(self.catalog_file) or bool(os.listdir(self.dots_dir))
        except OSError:
            return False

    def kept_catalogs(self) -> list[str]:
        """Paths of catalogs that knew more than the log and were not put back yet, oldest first."""
        try:
            names = os.listdir(self.damaged_dir)
        except FileNotFoundError:
            return []
        found = [n for n in names if n.startswith("catalog-") and n.endswith(".sqlite")]
        return [os.path.join(self.damaged_dir, n) for n in sorted(found, key=lambda n: (len(n), n))]

    def unacknowledged_losses(self) -> list[str]:
        """What was lost and nobody confirmed yet, or may still come back by a repair; one line
        each. As long as there is any, refs may be missing: what no ref names is no garbage.

        Raises:
            StorageFailed
        """
        told = EventLog(self.events_dir).lost_end()
        for path in self.kept_catalogs():
            told.append(f"{os.path.basename(path)} in damaged knows what the event log lost")
        if os.path.lexists(self.losses_file):
            what = "what a repair could not put back is named in damaged/lost"
            told.append(f"{what} (to accept that: dm fsck --repair --accept-loss)")
        return told

    def read_format(self) -> Format:
        """Raises StoreNotFound, Corruption, AccessDenied, StorageFailed."""
        try:
            with open(self.format_file, "rb") as file:
                data = file.read(_FORMAT_BYTES_MAX)
        except (FileNotFoundError, NotADirectoryError) as exc:
            if self.holds_something():
                raise Corruption(
                    f"the store at {self.home} has lost its file format",
                    hint="dm fsck --repair writes it again",
                    path=self.format_file,
                ) from exc
            raise StoreNotFound(
                f"no store at {self.home}", hint="make one with: dm init DOT", home=self.home
            ) from exc
        except PermissionError as exc:
            raise AccessDenied(f"no access to the store at {self.home}", home=self.home) from exc
        except OSError as exc:
            raise StorageFailed(
                f"cannot read {self.format_file}: {exc.strerror}", errno=exc.errno or 0
            ) from exc
        return parse_format(data, self.format_file)


def create_store(
    home: str, *, cluster_id: bytes, epoch: int, op_id: bytes, time_ns: int, actor: str
) -> Layout:
    """Make an empty store at `home`, durable on return; its log holds StoreCreated.

    The format file comes last: until it is there, nothing is a store, and the next attempt
    starts over. `home` may exist when it is an empty directory of ours or such a remnant.

    Raises:
        AlreadyExists: a store is there, or a directory with other things in it.
        AccessDenied: somebody else's directory.
    """
    layout = Layout(home)
    created = (StoreCreated(cluster_id, epoch),)
    make_directory_durable(layout.home)
    _check_owner(layout.home)
    with FileLock(layout.lock_file, what=f"the store at {layout.home}"):
        return _build_store(layout, Operation(1, time_ns, op_id, "init", actor, created))


def _build_store(layout: Layout, first: Operation) -> Layout:
    if os.path.lexists(layout.format_file):
        raise AlreadyExists(f"there is a store at {layout.home} already", home=layout.home)
    _remove_remnant(layout)
    os.chmod(layout.home, 0o700)
    for path in (layout.events_dir, layout.dots_dir, layout.trash_dir):
        make_directory_durable(path)
    EventLog(layout.events_dir).append(first, START)
    fsync_directory(layout.home)
    # From here on the store exists.
    write_file_atomic(layout.format_file, Format(FORMAT_VERSION).to_bytes())
    make_reserve(layout.reserve_file)
    return layout


def _remove_remnant(layout: Layout) -> None:
    """Clear what an interrupted create_store left; refuse anything it would not have made."""
    made = {"events", "dots", "trash", "lock", "config.toml", "known_hosts", "crash.log"}
    present = os.listdir(layout.home)
    foreign = sorted(name for name in present if name not in made and not name.startswith("format"))
    holds_dots = os.path.isdir(layout.dots_dir) and os.listdir(layout.dots_dir)
    if foreign or holds_dots:
        raise AlreadyExists(
            f"{layout.home} is not empty and no store", hint="choose another DM_HOME"
        )
    if os.path.isdir(layout.events_dir):
        from shutil import rmtree  # slow to import, and rarely needed

        rmtree(layout.events_dir)


def open_store(home: str, *, writing: bool = True, sudo_user: int | None = None) -> Layout:
    """Check that a store is at `home` and that this release and this user may use it. `sudo_user`:
    who became root through sudo to run this.

    Raises:
        StoreNotFound, FormatUnsupported, Corruption
        AccessDenied: it belongs to another user, and is not `sudo_user`.
    """
    layout = Layout(home)
    layout.read_format().check(writing=writing)
    _check_owner(layout.home, sudo_user)
    return layout


def _check_owner(home: str, sudo_user: int | None = None) -> None:
    """Another user's store would run that user's choice of paths and hooks as us: root uses its own
    only, and through sudo that of whoever called it, as git does."""
    status = os.stat(home)
    if not stat.S_ISDIR(status.st_mode):
        raise StoreNotFound(f"{home} is not a directory", home=home)
    if status.st_uid not in (os.geteuid(), sudo_user):
        raise AccessDenied(
            f"the store at {home} belongs to user {status.st_uid}",
            hint="set DM_HOME to a store of your own, or run dm as that user",
            home=home,
            owner=status.st_uid,
        )
