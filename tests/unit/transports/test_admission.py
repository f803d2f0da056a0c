"""Counting connections that have not logged in."""

from dmsync.transports.admission import Admission, ServerLimits, source_of


def admitted(admission: Admission, count: int, source: str = "10.{}.{}.1") -> int:
    return sum(admission.admits(source.format(i // 256, i % 256)) for i in range(count))


def test_ten_are_free_and_a_hundred_the_end() -> None:
    assert admitted(Admission(ServerLimits(), chance=lambda: 0.0), 50) == 10
    assert admitted(Admission(ServerLimits(), chance=lambda: 0.999), 500) == 100


def test_one_source_has_its_own_limit() -> None:
    admission = Admission(ServerLimits(per_source_max=3), chance=lambda: 0.999)
    assert admitted(admission, 9, "10.0.0.1") == 3
    assert admission.admits("10.0.0.2")
    admission.authenticated("10.0.0.1")
    assert admission.admits("10.0.0.1")
    assert not admission.admits("10.0.0.1")
    admission.closed("10.0.0.1", was_authenticated=True)
    assert not admission.admits("10.0.0.1")
    admission.closed("10.0.0.1", was_authenticated=False)
    assert admission.admits("10.0.0.1")


def test_all_connections_have_a_limit() -> None:
    admission = Admission(ServerLimits(connections_max=2))
    for address in ("10.0.0.1", "10.0.0.2"):
        assert admission.admits(address)
        admission.authenticated(address)
    assert not admission.admits("10.0.0.3")


def test_sources() -> None:
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:0:1%eth0")
    assert source_of("2001:db8::1") != source_of("2001:db8:0:1::1")
    assert source_of("::ffff:10.0.0.1") == source_of("10.0.0.1")
    assert source_of("/run/socket") == "/run/socket"


def test_who_logs_in_takes_the_place_of_who_stalls() -> None:
    """A hundred connections of ten sources wait; a new source gets in, and the oldest of the
    busiest goes."""
    ended: list[int] = []
    admission = Admission(ServerLimits(), lambda: 0.999, lambda: 0.0)
    for number in range(100):
        source = f"10.0.0.{number % 10}"
        assert admission.admits(source, lambda number=number: ended.append(number))
    assert not admission.admits("10.0.0.1"), "a source that has its share"

    def stay() -> None:
        raise AssertionError("it logs in")

    assert admission.admits("10.0.1.1", stay)
    assert ended == [0]
    admission.authenticated("10.0.1.1", stay)
    admission.closed("10.0.1.1", stay, was_authenticated=True)
    assert admission.connections_count == 99


def test_one_of_each_source_gives_way_only_when_it_has_stalled() -> None:
    now_s = 0.0
    ended: list[int] = []
    admission = Admission(ServerLimits(), lambda: 0.999, lambda: now_s)
    for number in range(100):
        assert admission.admits(f"10.0.{number}.1", lambda number=number: ended.append(number))
    assert not admission.admits("10.1.0.1") and not ended
    now_s = 10.0
    assert admission.admits("10.1.0.1") and ended == [0]


def test_a_source_of_logins_gets_in_though_all_places_are_fresh() -> None:
    admission = Admission(ServerLimits(), lambda: 0.999, lambda: 0.0)
    assert admission.admits("10.9.9.9")
    admission.authenticated("10.9.9.9")
    ended: list[int] = []
    for number in range(100):
        assert admission.admits(f"10.0.{number}.1", lambda number=number: ended.append(number))
    assert not admission.admits("10.1.0.1")
    assert admission.admits("10.9.9.9") and ended == [0]
    assert not admission.admits("10.1.0.1") and ended == [0], "nor does it give way itself"
