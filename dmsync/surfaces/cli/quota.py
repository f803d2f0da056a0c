"""`dm quota set|rm|list`: how much the dots of a namespace may take on this store."""

import re
from typing import Final

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE_MAX: Final = 1 << 60


def _size(text: str) -> int:
    """Bytes: a number with k, M, G or T behind it, or none. Raises BadParameter."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([kKMGT]?)(?:i?B)?", text)
    size = 0 if found is None else int(float(found[1]) * (1 << _UNITS[found[2].upper()]))
    if found is None or size > _SIZE_MAX:
        raise click.BadParameter("a size is bytes, such as 500M or 20G (powers of 1024)")
    return size


@click.group("quota", epilog="Example: dm quota set alice 20G")
def quota_command() -> None:
    """Bound what the dots of a namespace may take on this store.

    What counts is what lies on the disk for them: packs, their index, and pushes that were cut.
    A push that does not fit is refused, and what it brought is thrown away.
    """


@quota_command.command("set", cls=DmCommand, epilog="Example: dm quota set alice 20G")
@click.argument("namespace")
@click.argument("size", type=_size)
@changing_options
@click.pass_obj
def set_command(invocation: Invocation, namespace: str, size: int) -> None:
    """Let NAMESPACE take SIZE at most (500M, 20G). What is there already stays."""
    from dmsync.core.names import check_namespace
    from dmsync.engine.quotas import set_quota

    check_namespace(namespace)
    with invocation.open_store() as store:
        if invocation.dry_run:
            invocation.talk(f"would let {namespace} take {output.human_size(size)}")
        else:
            set_quota(store, namespace, size)
    if invocation.as_json:
        invocation.summary({"namespace": namespace, "bytes_max": size})


@quota_command.command("rm", cls=DmCommand, epilog="Example: dm quota rm alice")
@click.argument("namespace")
@changing_options
@click.pass_obj
def rm_command(invocation: Invocation, namespace: str) -> None:
    """Let NAMESPACE take as much as fits."""
    from dmsync.engine.quotas import remove_quota
    from dmsync.errors import NotFound

    with invocation.open_store() as store:
        if store.catalog.quota(namespace) is None:
            raise NotFound(f"namespace {namespace} has no quota", hint="dm quota list")
        if invocation.dry_run:
            invocation.talk(f"would let {namespace} take as much as fits")
        else:
            remove_quota(store, namespace)
    if invocation.as_json:
        invocation.summary({"namespace": namespace, "bytes_max": None})


@quota_command.command("list", cls=DmCommand, epilog="Example: dm quota list --json")
@query_options
@click.pass_obj
def list_command(invocation: Invocation) -> None:
    """List the namespaces: what each takes, and may take. The store's own is shown as `-`."""
    from dmsync.engine.quotas import list_quotas

    with invocation.open_store() as store:
        usages = list_quotas(store)
    if invocation.as_json:
        invocation.document(
            [
                {
                    "namespace": usage.namespace,
                    "bytes_used": usage.bytes_used,
                    "bytes_max": usage.bytes_max,
                }
                for usage in usages
            ]
        )
        return
    rows = [
        (
            usage.namespace or "-",
            output.human_size(usage.bytes_used),
            "-" if usage.bytes_max is None else output.human_size(usage.bytes_max),
        )
        for usage in usages
    ]
    for line in output.table([("NAMESPACE", "USED", "QUOTA"), *rows]):
        output.write_line(line)
