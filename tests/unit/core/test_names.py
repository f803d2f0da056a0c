import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmsync.core import names
from dmsync.core.names import DotName, RemoteUrl, parse_dot_name, parse_remote_url
from dmsync.errors import InvalidName


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shop", DotName("shop")),
        ("ns/shop", DotName("shop", "ns")),
        ("shop@topic", DotName("shop", None, "topic")),
        ("shop.db", DotName("shop", None, None, "db")),
        ("ns/shop@topic.db", DotName("shop", "ns", "topic", "db")),
        ("shop.__root__", DotName("shop", None, None, "__root__")),
        ("shop@topic.__default__", DotName("shop", None, "topic", "__default__")),
    ],
)
def test_dot_expressions(text, expected):
    assert parse_dot_name(text) == expected and str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "a/b/c", "-x", "a" * 65, "shop@", "shop.", "shop.__x__", "shop@HEAD", "shop@beef",
     "shop@a@b", "a b", "ü", "shop.a.b", "shop\n", "../x", "shop@a/b", "a\0"],
)  # fmt: skip
def test_bad_dot_expressions_are_refused(text):
    with pytest.raises(InvalidName, match=r"^invalid (dot|namespace|branch|subdot) name \""):
        parse_dot_name(text)


def test_length_limits_are_exact():
    assert names.check_dot_name("a" * 64)
    assert names.check_branch_name("x" * 128, made_by_dm=True)
    with pytest.raises(InvalidName):
        names.check_branch_name("x" * 65)
    with pytest.raises(InvalidName):
        names.check_branch_name("x" * 129, made_by_dm=True)


@pytest.mark.parametrize("name", ["HEAD", "head", "beef", "0" * 64, "dead", "a~b", "a^", "a:b", "a..b", "@{u}"])  # fmt: skip
def test_branch_names_that_read_as_revisions_are_refused(name):
    with pytest.raises(InvalidName):
        names.check_branch_name(name)


@pytest.mark.parametrize("name", ["abc", "master", "beef-2", "0" * 65, "prod_1"])
def test_other_branch_names_are_fine(name):
    assert names.check_branch_name(name, made_by_dm=True) == name


def test_tags_may_hold_dots():
    assert names.check_tag_name("v1.0") == "v1.0"
    for bad in ("v1..2", "v1.", ".v", "v 1", "12ab"):
        with pytest.raises(InvalidName):
            names.check_tag_name(bad)


@pytest.mark.parametrize("name", ["branch/x", "tag/v1.0", "remote/r/x", "remote/r/tag/v1.0", "stash/x", "branch/x-DIVERGED-2026-11-21T09-30-00Z"])  # fmt: skip
def test_ref_names(name):
    assert names.check_ref_name(name) == name


@pytest.mark.parametrize("name", ["x", "branch/", "branch/a/b", "heads/x", "remote/r", "remote//x", "tag/../x"])  # fmt: skip
def test_bad_ref_names_are_refused(name):
    with pytest.raises(InvalidName):
        names.check_ref_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", RemoteUrl("ssh", "host")),
        ("me@host.example", RemoteUrl("ssh", "host.example", "me")),
        ("host:2222", RemoteUrl("ssh", "host", None, 2222)),
        ("me@host:/srv/dm", RemoteUrl("ssh", "host", "me", None, "/srv/dm")),
        ("ssh://host", RemoteUrl("ssh", "host")),
        ("ssh://me@host:22/srv/dm", RemoteUrl("ssh", "host", "me", 22, "/srv/dm")),
        ("ssh://host/", RemoteUrl("ssh", "host")),
        ("ssh://[::1]:22/x", RemoteUrl("ssh", "::1", None, 22, "/x")),
        ("[::1]:22", RemoteUrl("ssh", "::1", None, 22)),
        ("/srv/my store", RemoteUrl("local", path="/srv/my store")),
        ("./x", RemoteUrl("local", path="./x")),
        ("../x", RemoteUrl("local", path="../x")),
        ("~/x", RemoteUrl("local", path="~/x")),
    ],
)
def test_remote_urls(text, expected):
    assert parse_remote_url(text) == expected
    assert parse_remote_url(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "-oProxyCommand=x", "me@-x", "-me@host", "ssh://-x/", "ssh://-l@host", "http://host", "host:0",
     "host:65536", "host:x", "host:", "a b", "host\n", "ho'st", 'ho"st', "host:/a b", "host:/a;b",
     "host:/a$(x)", "me:pw@host", "ssh://me:pw@host", "ssh://", "@host", "[::1", "[-x]", "host/path",
     "/a\0b", "host:/a\x1bb", "ssh://host:22x/"],
)  # fmt: skip
def test_unsafe_remote_urls_are_refused(text):
    with pytest.raises(InvalidName, match="invalid remote URL"):
        parse_remote_url(text)


@given(st.text(max_size=40))
def test_any_text_parses_to_something_safe_or_is_refused(text):
    for parse in (parse_dot_name, parse_remote_url, names.check_ref_name):
        try:
            parsed = parse(text)
        except InvalidName as exc:
            assert exc.message.isprintable()
        else:
            assert (
                not str(parsed).startswith("-") and str(parsed).isprintable()
            ) or parsed.kind == "local"
