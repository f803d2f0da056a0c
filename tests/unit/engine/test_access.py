"""Roles, patterns and namespaces: every cell that matters, deny by default."""

import pytest

from dmsync.engine.access import (
    Access,
    Role,
    access_for,
    full_access,
    parse_dot_pattern,
)
from dmsync.engine.ports import Verb

VERBS: tuple[Verb, ...] = ("read", "append", "write", "admin")


def allowed(access: Access, namespace: str, name: str) -> list[str]:
    return [verb for verb in VERBS if access.may(namespace, name, verb)]


def shared(user: str, namespace: str, name: str) -> bool:
    return (user, namespace, name) == ("bob", "alice", "shared")


@pytest.mark.parametrize("count", range(4))
def test_each_role_includes_those_before_it(count: int) -> None:
    access = access_for("owner", Role(count + 1), None, owner="owner")
    assert allowed(access, "", "dot") == list(VERBS[: count + 1])


@pytest.mark.parametrize(
    ("user", "role", "namespace", "name", "expected"),
    [
        ("bob", Role.WRITE, "bob", "dot", ["read", "append", "write"]),
        ("bob", Role.WRITE, "", "dot", []),
        ("bob", Role.WRITE, "alice", "dot", []),
        ("bob", Role.WRITE, "bobby", "dot", []),
        ("bob", Role.WRITE, "alice", "shared", ["read", "append", "write"]),
        ("bob", Role.READ, "alice", "shared", ["read"]),
        ("bob", Role.ADMIN, "alice", "dot", list(VERBS)),
        ("owner", Role.WRITE, "alice", "dot", ["read", "append", "write"]),
        ("admin", Role.APPEND, "alice", "dot", ["read", "append"]),
    ],
)
def test_users_stay_in_their_namespace_and_what_is_shared(
    user: str, role: Role, namespace: str, name: str, expected: list[str]
) -> None:
    access = access_for(user, role, None, owner="owner", is_collaborator=shared)
    assert allowed(access, namespace, name) == expected


def test_patterns_narrow_and_let_read_elsewhere() -> None:
    access = access_for("bob", Role.WRITE, ["db-*", "alice/web"], owner="owner")
    assert allowed(access, "bob", "db-1") == ["read", "append", "write"]
    assert allowed(access, "bob", "other") == []
    assert allowed(access, "alice", "web") == ["read"]
    assert allowed(access, "alice", "db-1") == []


def test_patterns_hold_for_the_owner_too() -> None:
    access = access_for("owner", Role.ADMIN, ["prod"], owner="owner")
    assert allowed(access, "", "prod") == list(VERBS)
    assert allowed(access, "", "prod2") == []
    assert allowed(access, "alice", "prod") == []


def test_a_star_alone_is_every_dot() -> None:
    access = access_for("backup", Role.READ, ["*"], owner="owner")
    assert allowed(access, "", "dot") == allowed(access, "alice", "dot") == ["read"]


@pytest.mark.parametrize("text", ["", "/", "a/", "/a", "a/b/c", "a b", "a;b", "a\n", "../x"])
def test_bad_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no dot pattern"):
        parse_dot_pattern(text, "")


def test_unknown_verbs_are_denied() -> None:
    assert not full_access("root").may("", "dot", "destroy")  # type: ignore[arg-type]


def test_default_namespace_is_elided_for_owner_and_admin() -> None:
    def namespace(user: str, role: Role = Role.WRITE) -> str:
        return access_for(user, role, None, owner="owner").default_namespace

    assert (namespace("owner"), namespace("admin"), namespace("bob")) == ("", "", "bob")
    assert namespace("bob", Role.ADMIN) == ""
    assert full_access("root").default_namespace == ""
