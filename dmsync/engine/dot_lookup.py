"""Which dot is meant. Nearly every command asks, so that little is imported here."""

from dmsync.core.names import DotName, parse_dot_name
from dmsync.engine.store import Store
from dmsync.errors import DotNotFound, UsageError
from dmsync.storage.catalog import DotRow


def display_name(store: Store, namespace: str, name: str) -> str:
    """`name`, with its namespace unless that is the store's own."""
    return name if namespace == store.settings.namespace else f"{namespace}/{name}"


def find_dot(store: Store, text: str) -> DotRow:
    """The dot of that name, `[namespace/]dot`.

    Raises:
        DotNotFound, InvalidName; UsageError: a branch or subdot, which would go unheeded here.
    """
    expression = parse_dot_name(text)
    for what, part in (("branch @", expression.branch), ("subdot .", expression.subdot)):
        if part is not None:
            raise UsageError(
                f"{text}: a dot's name alone is expected here, without the {what}{part}",
                hint=f"dm checkout {part} chooses the branch" if "@" in what else "",
            )
    return find_written(store, expression)


def find_written(store: Store, expression: DotName) -> DotRow:
    """The dot that a name names; its branch and subdot are not looked at. Raises DotNotFound."""
    namespace = expression.namespace or store.settings.namespace
    row = store.catalog.dot_by_name(namespace, expression.dot)
    if row is None:
        written = display_name(store, namespace, expression.dot)
        raise DotNotFound(
            f"No such filesystem named {written}: the dot doesn't exist", hint="dm list shows dots"
        )
    return row


def resolve_dot(store: Store, name: str | None) -> DotRow:
    """The named dot, else the current one, else the only one.

    Raises:
        DotNotFound: no such dot, or several and none chosen.
    """
    if name is not None:
        return find_dot(store, name)
    current = store.catalog.current_dot()
    if current is not None:
        row = store.catalog.dot(current)
        if row is not None and row.trash is None:
            return row
    dots = store.catalog.dots()
    if len(dots) == 1:
        return dots[0]
    raise DotNotFound(
        "No current dot is selected",
        hint="dm init DOT makes the first" if not dots else "dm switch DOT chooses one",
    )
