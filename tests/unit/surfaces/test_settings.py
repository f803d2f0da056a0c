import os
from pathlib import Path

import pytest

from dmsync.errors import ConfigError
from dmsync.surfaces import settings as module
from dmsync.surfaces.settings import default_identity, load_settings, store_home


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(tmp_path), "DM_HOME": str(tmp_path / "store"), **more}


def write_config(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def user_config(tmp_path: Path, text: str) -> Path:
    return write_config(tmp_path / ".config" / "dm" / "config.toml", text)


def test_defaults_need_nothing_but_a_home(tmp_path: Path) -> None:
    settings = load_settings({"HOME": str(tmp_path)})
    assert settings.author == settings.actor == default_identity()
    assert settings.lock_wait_s == 10
    assert settings.namespace == ""
    assert settings.hooks == {} and settings.remotes == {}
    assert load_settings({}).home


def test_home_of_root_and_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert store_home({"HOME": "/root"}) == "/var/lib/dmsync"
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert store_home({"HOME": "/home/u"}) == "/home/u/.local/share/dmsync"
    assert store_home({"HOME": "/home/u", "XDG_DATA_HOME": "/data"}) == "/data/dmsync"
    assert store_home({"HOME": "/home/u", "XDG_DATA_HOME": "rel"}) == (
        "/home/u/.local/share/dmsync"
    )
    assert store_home({"DM_HOME": "/srv/dm"}) == "/srv/dm"
    assert store_home({"DM_HOME": "/srv/dm"}, "/flag") == "/flag"


def test_no_home_at_all_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    with pytest.raises(ConfigError) as caught:
        store_home({})
    assert "DM_HOME" in caught.value.hint


def test_flags_win_over_environment_over_files_over_defaults(tmp_path: Path) -> None:
    user_config(tmp_path, '[user]\nauthor = "user file"\nnamespace = "team"\n')
    assert load_settings(environment(tmp_path)).author == "user file"
    write_config(tmp_path / "store" / "config.toml", '[user]\nauthor = "store file"\n')
    settings = load_settings(environment(tmp_path))
    assert (settings.author, settings.namespace) == ("store file", "team")
    given = environment(tmp_path, DM_AUTHOR="env", DM_DOT="envdot", DM_LOCK_WAIT="3")
    assert load_settings(given).author == "env"
    assert load_settings(given).dot == "envdot"
    assert load_settings(given).lock_wait_s == 3
    flagged = load_settings(given, dot="flag", lock_wait_s=0.0)
    assert (flagged.dot, flagged.lock_wait_s) == ("flag", 0)


def test_remotes_and_hooks_of_both_files_are_joined(tmp_path: Path) -> None:
    user_config(tmp_path, '[remote.a]\nurl = "host"\n[dot.app.hooks]\nquiesce = "one"\n')
    write_config(
        tmp_path / "store" / "config.toml",
        '[remote.a]\ndm-command = "/opt/dm"\n[dot.app.hooks]\nquiesce = "two"\ntimeout_s = 5\n',
    )
    settings = load_settings(environment(tmp_path))
    assert settings.remotes["a"].url == "host"
    assert settings.remotes["a"].dm_command == "/opt/dm"
    assert set(settings.hooks) == {"app"}


def test_drivers_units_and_keys_reach_the_engine(tmp_path: Path) -> None:
    user_config(
        tmp_path,
        '[diff.json]\ncommand = "jd"\npatterns = ["*.json"]\n'
        '[diff.any]\ncommand = "cat"\npatterns = ["*"]\n'
        '[merge]\nunits = ["*/pgdata"]\n'
        '[merge.json]\ncommand = "jm"\npatterns = ["*.json", "*.js"]\n'
        '[user]\nsigning-key = "~/.ssh/id"\nallowed-signers = "/etc/signers"\n',
    )
    write_config(
        tmp_path / "store" / "config.toml",
        '[diff.json]\ncommand = "other"\n[merge]\nunits = ["*/data", "*/pgdata"]\n',
    )
    engine = load_settings(environment(tmp_path)).engine
    assert [(d.name, d.command, d.patterns) for d in engine.diff_drivers] == [
        ("json", "other", ("*.json",)),
        ("any", "cat", ("*",)),
    ]
    assert [(d.name, d.patterns) for d in engine.merge_drivers] == [("json", ("*.json", "*.js"))]
    assert engine.merge_units == ("*/pgdata", "*/data")
    assert engine.signing_key == str(tmp_path / ".ssh" / "id")
    assert engine.allowed_signers == "/etc/signers"


def test_a_named_config_replaces_the_users_and_must_exist(tmp_path: Path) -> None:
    user_config(tmp_path, '[user]\nauthor = "default file"\n')
    other = write_config(tmp_path / "other.toml", '[user]\nauthor = "other"\n')
    assert load_settings(environment(tmp_path, DM_CONFIG=str(other))).author == "other"
    assert load_settings(environment(tmp_path), config=str(other)).author == "other"
    with pytest.raises(ConfigError):
        load_settings(environment(tmp_path, DM_CONFIG=str(tmp_path / "absent")))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_config_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = user_config(tmp_path, "")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="written by others"):
        load_settings(environment(tmp_path))


def test_a_config_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = user_config(tmp_path, "")
    status = list(os.stat(path))
    status[4] = 54321
    with pytest.raises(ConfigError, match="belongs to user 54321"):
        module._check_private(str(path), os.stat_result(status))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[user", "config.toml"),
        ('[usr]\nauthor = "x"', "unknown setting usr"),
        ('[user]\nautor = "x"', "unknown setting user.autor"),
        ("[user]\nauthor = 3", "user.author is not a text"),
        ('[remote.r]\ncommand = "x"', "unknown setting remote.r.command"),
        ('[dot.d]\nquiesce = "x"', "unknown setting dot.d.quiesce"),
        ('[dot.d.hooks]\nquiece = "x"', "unknown setting dot.d.hooks.quiece"),
        ('dot = "d"', "dot is not a table"),
        ('[diff.j]\ncomand = "x"', "unknown setting diff.j.comand"),
        ("[diff.j]\ncommand = 3", "diff.j.command is not a text"),
        ('[diff.j]\ncommand = "x"\npatterns = "*.j"', "diff.j.patterns is not a list of texts"),
        ('[diff.j]\ncommand = "x"\npatterns = [3]', "diff.j.patterns is not a text"),
        ('[diff.j]\ncommand = "x"\npatterns = []', "diff.j.patterns is empty"),
        ('[diff.j]\ncommand = "x"', "diff.j has no patterns"),
        ('[merge.j]\npatterns = ["x"]', "merge.j has no command"),
        ('[diff]\nunits = ["x"]', "diff.units is not a table"),
        ('[merge]\nunits = "x"', "merge.units is not a list of texts"),
        ('[merge]\nunit = ["x"]', "merge.unit is not a table"),
        ("[user]\nsigning-key = 3", "user.signing-key is not a text"),
    ],
)
def test_a_config_that_means_nothing_is_refused(tmp_path: Path, text: str, told: str) -> None:
    user_config(tmp_path, text)
    with pytest.raises(ConfigError, match=told):
        load_settings(environment(tmp_path))


def test_a_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_settings(environment(tmp_path, DM_CONFIG=str(tmp_path / "pipe")))


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf"])
@pytest.mark.parametrize("name", ["DM_LOCK_WAIT", "DM_PROGRESS_FPS"])
def test_numbers_in_variables_are_checked(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_settings(environment(tmp_path, **{name: text}))
