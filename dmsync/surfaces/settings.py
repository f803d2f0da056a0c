"""Settings of one run: flags over DM_* variables over configuration files over defaults.

The only module that reads the environment or configuration. Works with nothing but HOME, or not
even that, in the environment. Configuration files hold commands to run, so a file that somebody
else could have written is refused.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final

from dmsync.core.names import without_password
from dmsync.core.values import plain_value_type
from dmsync.errors import ConfigError

if TYPE_CHECKING:
    from dmsync.engine.hooks import HookCommands
    from dmsync.engine.settings import DriverCommand, EngineSettings

SYSTEM_HOME: Final = "/var/lib/dmsync"
LOCK_WAIT_S: Final = 10.0
GC_GRACE: Final = "14d"
CONFIG_BYTES_MAX: Final = 1024 * 1024
_TEXT_VARIABLES: Final = ("DM_AUTHOR", "DM_DOT", "DM_NAMESPACE")
_USER_KEYS: Final = {"author", "namespace", "signing-key", "allowed-signers"}
_REMOTE_KEYS: Final = {"dm-command", "url"}
_DOT_KEYS: Final = {"hooks"}
_GC_KEYS: Final = {"grace"}
_HOOK_KEYS: Final = {"quiesce", "unquiesce", "hold", "timeout_s"}
_DRIVER_KEYS: Final = {"command", "patterns"}
_UNITS: Final = "units"
"""The one key of [merge] that names no driver."""


@plain_value_type
class RemoteConfig:
    """What a configuration file says about one remote; overrides what the store recorded."""

    url: str | None = None
    dm_command: str | None = None


@plain_value_type
class SshSession:
    """What an sshd that runs this says of the session: the command the client asked for (None: a
    forced command was not needed), where it comes from, and the file that tells its keys."""

    original_command: str | None = None
    address: str = ""
    auth_info_file: str | None = None


@plain_value_type
class Settings:
    """Everything the environment and the configuration decide for one run."""

    home: str
    home_given: bool = False
    """The store was named by a flag: it is expected to be there, not to be made."""
    dot: str | None = None
    namespace: str = ""
    author: str = ""
    actor: str = ""
    lock_wait_s: float = LOCK_WAIT_S
    ssh_command: str | None = None
    ssh_key: str | None = None
    gc_grace: str = GC_GRACE
    """How long gc lets undo bring things back, as it is written."""
    ssh_session: "SshSession | None" = None
    known_hosts: str | None = None
    user_home: str | None = None
    progress_fps: float | None = None
    color: bool = True
    terminal: bool = True
    remotes: Mapping[str, RemoteConfig] = field(default_factory=dict)
    hooks: Mapping[str, "HookCommands"] = field(default_factory=dict)
    diff_drivers: tuple["DriverCommand", ...] = ()
    merge_drivers: tuple["DriverCommand", ...] = ()
    merge_units: tuple[str, ...] = ()
    signing_key: str | None = None
    allowed_signers: str | None = None
    sudo_user: int | None = None

    @property
    def engine(self) -> "EngineSettings":
        """The part that the engine gets."""
        from dmsync.engine.settings import EngineSettings

        return EngineSettings(
            author=self.author,
            actor=self.actor,
            namespace=self.namespace,
            lock_wait_s=self.lock_wait_s,
            hooks=self.hooks,
            diff_drivers=self.diff_drivers,
            merge_drivers=self.merge_drivers,
            merge_units=self.merge_units,
            signing_key=self.signing_key,
            allowed_signers=self.allowed_signers,
            sudo_user=self.sudo_user,
        )


def load_settings(
    environment: Mapping[str, str],
    *,
    home: str | None = None,
    config: str | None = None,
    dot: str | None = None,
    lock_wait_s: float | None = None,
) -> Settings:
    """Settings from `environment` and the configuration files; arguments given as flags win.

    Raises:
        ConfigError: a variable or file that cannot be read as what it should be, or a
            configuration file that others may write.
    """
    _refuse_undecodable(environment)
    store = store_home(environment, home)
    user_file = _read_user_config(environment, config)
    store_file = _read_config(os.path.join(store, "config.toml"), required=False)
    sections = _Sections(user_file, store_file)
    identity = default_identity()
    user = sections.user()
    if lock_wait_s is None:
        lock_wait_s = _number(environment, "DM_LOCK_WAIT", 86400.0)
    return Settings(
        home=store,
        home_given=home is not None,
        dot=dot or environment.get("DM_DOT") or None,
        namespace=environment.get("DM_NAMESPACE") or user.get("namespace", ""),
        author=environment.get("DM_AUTHOR") or user.get("author") or identity,
        actor=identity,
        lock_wait_s=LOCK_WAIT_S if lock_wait_s is None else lock_wait_s,
        ssh_command=environment.get("DM_SSH_COMMAND") or None,
        ssh_key=environment.get("DM_SSH_KEY") or None,
        ssh_session=_ssh_session(environment),
        known_hosts=environment.get("DM_KNOWN_HOSTS") or None,
        user_home=environment.get("HOME") or None,
        sudo_user=_sudo_user(environment),
        progress_fps=_number(environment, "DM_PROGRESS_FPS", 60.0),
        color=not environment.get("NO_COLOR"),
        terminal=environment.get("TERM", "dumb") != "dumb",
        remotes=sections.remotes(),
        hooks=sections.hooks(),
        diff_drivers=sections.drivers("diff"),
        merge_drivers=sections.drivers("merge"),
        merge_units=sections.merge_units(),
        signing_key=_user_path(environment, user.get("signing-key")),
        allowed_signers=_user_path(environment, user.get("allowed-signers")),
        gc_grace=sections.gc_grace(),
    )


def _ssh_session(environment: Mapping[str, str]) -> SshSession | None:
    """None outside of sshd. SSH_USER_AUTH is there with `ExposeAuthInfo yes`."""
    command = environment.get("SSH_ORIGINAL_COMMAND")
    connection = environment.get("SSH_CONNECTION", "").split()
    if command is None and not connection:
        return None
    return SshSession(
        command, connection[0] if connection else "", environment.get("SSH_USER_AUTH") or None
    )


def _user_path(environment: Mapping[str, str], given: str | None) -> str | None:
    """A file that the configuration names: `~/` is the user's home, and so begin relative ones."""
    if given is None or os.path.isabs(given):
        return given
    return os.path.join(_user_home(environment), given.removeprefix("~/"))


def _refuse_undecodable(environment: Mapping[str, str]) -> None:
    """What ends up in commits and in the event log is Unicode."""
    for name in _TEXT_VARIABLES:
        try:
            environment.get(name, "").encode("utf-8")
        except UnicodeEncodeError as exc:
            raise ConfigError(f"{name} is not UTF-8 text") from exc


def store_home(environment: Mapping[str, str], given: str | None = None) -> str:
    """The store's directory, absolute: the flag, DM_HOME, root's or the user's default."""
    chosen = given or environment.get("DM_HOME")
    if chosen:
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return SYSTEM_HOME
    data = environment.get("XDG_DATA_HOME")
    if data and os.path.isabs(data):  # the XDG specification: relative ones are to be ignored
        return os.path.join(data, "dmsync")
    return os.path.join(_user_home(environment), ".local", "share", "dmsync")


def user_name() -> str:
    """Who runs this, from the password file rather than from variables anybody sets."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's numeric user
        return str(os.geteuid())


def default_identity() -> str:
    """`user@host`."""
    return f"{user_name()}@{os.uname().nodename}"


def _user_home(environment: Mapping[str, str]) -> str:
    home = environment.get("HOME")
    if home:
        return home
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError as exc:
        raise ConfigError("no home directory is known", hint="set DM_HOME") from exc


def _sudo_user(environment: Mapping[str, str]) -> int | None:
    """Who became root to run this, as git takes it: only root is believed to have asked sudo."""
    text = environment.get("SUDO_UID", "")
    if os.geteuid() != 0 or not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text)


def _number(environment: Mapping[str, str], name: str, most: float) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:  # also refuses nan
        raise ConfigError(f"{name} is not a number from 0 to {most:g}: {text}")
    return value


# --- configuration files -----------------------------------------------------


def _read_user_config(environment: Mapping[str, str], given: str | None) -> dict[str, Any]:
    named = given or environment.get("DM_CONFIG")
    if named:
        return _read_config(os.path.abspath(named), required=True)
    base = environment.get("XDG_CONFIG_HOME")
    if not base or not os.path.isabs(base):
        try:
            base = os.path.join(_user_home(environment), ".config")
        except ConfigError:
            return {}
    return _read_config(os.path.join(base, "dm", "config.toml"), required=False)


def _read_config(path: str, *, required: bool) -> dict[str, Any]:
    """One TOML file. The checks are made on the open file: what was checked is what is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as exc:
        if required:
            raise ConfigError(f"no configuration file {path}") from exc
        return {}
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    with open(descriptor, "rb") as file:
        _check_private(path, os.fstat(descriptor))
        content = file.read(CONFIG_BYTES_MAX + 1)
    if len(content) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path} is longer than {CONFIG_BYTES_MAX} bytes")
    return _parse_config(path, content)


def _check_private(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}: it names commands, so only your own is read"
        )
    if status.st_mode & 0o022:
        raise ConfigError(
            f"{path} may be written by others: it names commands",
            hint=f"chmod go-w {path}",
        )


def _parse_config(path: str, content: bytes) -> dict[str, Any]:
    import tomllib

    try:
        document = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    _check_document(path, document)
    return document


def _check_document(path: str, document: Mapping[str, Any]) -> None:
    """Refuse what is not known: a misspelt hook that silently does nothing costs data."""
    _check_keys(path, "", document, {"user", "remote", "dot", "diff", "merge", "gc"})
    for key, value in _table(path, "user", document.get("user", {})).items():
        _check_keys(path, "user", {key: value}, _USER_KEYS)
        _text(path, f"user.{key}", value)
    for name, remote in _table(path, "remote", document.get("remote", {})).items():
        where = f"remote.{name}"
        for key, value in _table(path, where, remote).items():
            _check_keys(path, where, {key: value}, _REMOTE_KEYS)
            if without_password(_text(path, f"{where}.{key}", value)) != value and key == "url":
                raise ConfigError(f"{path}: {where}.url: a password does not belong in a URL")
    for name, dot in _table(path, "dot", document.get("dot", {})).items():
        where = f"dot.{name}"
        _check_keys(path, where, _table(path, where, dot), _DOT_KEYS)
        hooks = _table(path, f"{where}.hooks", dot.get("hooks", {}))
        _check_keys(path, f"{where}.hooks", hooks, _HOOK_KEYS)
    for key, value in _table(path, "gc", document.get("gc", {})).items():
        _check_keys(path, "gc", {key: value}, _GC_KEYS)
        _check_grace(path, _text(path, f"gc.{key}", value))
    _check_drivers(path, "diff", _table(path, "diff", document.get("diff", {})))
    merge = _table(path, "merge", document.get("merge", {}))
    _texts(path, f"merge.{_UNITS}", merge.get(_UNITS, []))
    drivers = {name: table for name, table in merge.items() if name != _UNITS}
    _check_drivers(path, "merge", drivers)


def _check_drivers(path: str, section: str, drivers: Mapping[str, Any]) -> None:
    for name, driver in drivers.items():
        where = f"{section}.{name}"
        _check_keys(path, where, _table(path, where, driver), _DRIVER_KEYS)
        if "command" in driver:
            _text(path, f"{where}.command", driver["command"])
        if not _texts(path, f"{where}.patterns", driver.get("patterns", ["*"])):
            raise ConfigError(f"{path}: {where}.patterns is empty: it would claim nothing")


def _check_grace(path: str, text: str) -> None:
    from dmsync.core.durations import parse_grace
    from dmsync.errors import UsageError

    try:
        parse_grace(text)
    except UsageError as exc:
        raise ConfigError(f"{path}: gc.grace: {exc.message}", hint=exc.hint) from exc


def _table(path: str, where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {where} is not a table")
    return value


def _check_keys(path: str, where: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            name = f"{where}.{key}" if where else key
            raise ConfigError(
                f"{path}: unknown setting {name}", hint=f"known are {', '.join(sorted(known))}"
            )


def _text(path: str, where: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{path}: {where} is not a text")
    return value


def _texts(path: str, where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: {where} is not a list of texts")
    return tuple(_text(path, where, item) for item in value)


class _Sections:
    """The user's file overlaid with the store's, setting by setting."""

    def __init__(self, user_file: dict[str, Any], store_file: dict[str, Any]) -> None:
        self._files = (user_file, store_file)

    def user(self) -> dict[str, str]:
        return {key: value for file in self._files for key, value in file.get("user", {}).items()}

    def gc_grace(self) -> str:
        """How long undo can bring things back, checked."""
        found: list[str] = [file["gc"]["grace"] for file in self._files if file.get("gc")]
        return found[-1] if found else GC_GRACE

    def remotes(self) -> dict[str, RemoteConfig]:
        merged: dict[str, dict[str, str]] = {}
        for file in self._files:
            for name, remote in file.get("remote", {}).items():
                merged.setdefault(name, {}).update(remote)
        return {
            name: RemoteConfig(url=remote.get("url"), dm_command=remote.get("dm-command"))
            for name, remote in merged.items()
        }

    def hooks(self) -> dict[str, "HookCommands"]:
        merged: dict[str, dict[str, Any]] = {}
        for file in self._files:
            for name, dot in file.get("dot", {}).items():
                if dot.get("hooks"):
                    merged.setdefault(name, {}).update(dot["hooks"])
        return {name: _hook_commands(name, hooks) for name, hooks in merged.items()}

    def drivers(self, section: str) -> tuple["DriverCommand", ...]:
        """Drivers of `diff` or `merge`, in the order in which they are written."""
        merged: dict[str, dict[str, Any]] = {}
        for file in self._files:
            for name, driver in file.get(section, {}).items():
                if isinstance(driver, dict):  # [merge] holds units besides
                    merged.setdefault(name, {}).update(driver)
        return tuple(_driver_command(section, name, driver) for name, driver in merged.items())

    def merge_units(self) -> tuple[str, ...]:
        units = [unit for file in self._files for unit in file.get("merge", {}).get(_UNITS, [])]
        return tuple(dict.fromkeys(units))


def _driver_command(section: str, name: str, driver: Mapping[str, Any]) -> "DriverCommand":
    from dmsync.engine.settings import DriverCommand

    for key in sorted(_DRIVER_KEYS):
        if key not in driver:
            raise ConfigError(f"{section}.{name} has no {key}")
    return DriverCommand(name, driver["command"], tuple(driver["patterns"]))


def _hook_commands(dot: str, hooks: Mapping[str, Any]) -> "HookCommands":
    """Checked commands of one dot; what is not given keeps its default."""
    from dmsync.engine.hooks import HOOK_TIMEOUT_S, HookCommands

    where = f"dot.{dot}.hooks"
    texts = {
        key: _text("the configuration", f"{where}.{key}", value)
        for key, value in hooks.items()
        if key != "timeout_s"
    }
    timeout_s = hooks.get("timeout_s", HOOK_TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or timeout_s <= 0:
        raise ConfigError(f"{where}.timeout_s is not a positive number")
    return HookCommands(**texts, timeout_s=float(timeout_s))
