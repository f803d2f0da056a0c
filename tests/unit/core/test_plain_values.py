"""Plain value types behave like the frozen dataclasses they stand for."""

from dataclasses import fields, replace

import pytest

from dmsync.core.values import plain_value_type


@plain_value_type
class Point:
    x: int
    y: int = 2
    name: str | None = None


@plain_value_type
class Other:
    x: int
    y: int = 2
    name: str | None = None


def test_values_are_made_compared_shown_and_replaced() -> None:
    assert Point(1) == Point(x=1, y=2) == Point(1, 2, None)
    assert Point(1) != Point(1, 3)
    assert Point(1) != Other(1)
    assert len({Point(1), Point(1, 2), Point(2)}) == 2
    assert repr(Point(1, name="a")) == "Point(x=1, y=2, name='a')"
    assert replace(Point(1), y=7) == Point(1, 7)
    assert [field.name for field in fields(Point)] == ["x", "y", "name"]
    match Point(4):
        case Point(4, y=2, name=None):
            pass
        case _:
            pytest.fail("patterns see the fields")


@pytest.mark.parametrize("values", [(), (1, 2, None, 4)])
def test_too_few_or_too_many_values_are_refused(values: tuple[int, ...]) -> None:
    with pytest.raises(TypeError):
        Point(*values)


@pytest.mark.parametrize("named", [{"x": 1}, {"z": 1}])
def test_values_given_twice_or_unknown_are_refused(named: dict[str, int]) -> None:
    with pytest.raises(TypeError):
        Point(1, **named)  # type: ignore[arg-type]
