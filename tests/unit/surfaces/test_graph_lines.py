from dmsync.surfaces.cli.graph_lines import GraphLanes


def drawn(*nodes: tuple[str, str]) -> list[str]:
    lanes: GraphLanes[str] = GraphLanes()
    return [
        line
        for node, following in nodes
        for line in lanes.place(node, list(following)).beside_text([node])
    ]


def test_a_line_of_history_is_one_column() -> None:
    assert drawn(("c", "b"), ("b", "a"), ("a", "")) == ["* c", "* b", "* a"]


def test_a_merge_opens_a_column_and_its_base_closes_it() -> None:
    assert drawn(("m", "ab"), ("b", "r"), ("a", "r"), ("r", "")) == [
        "*   m",
        "|\\",
        "| * b",
        "* | a",
        "|/",
        "* r",
    ]


def test_an_octopus_and_a_far_join_keep_every_lane() -> None:
    assert drawn(("m", "abc"), ("c", "r"), ("b", "r"), ("a", "r"), ("r", "")) == [
        "*     m",
        "|\\",
        "|\\ \\",
        "| * | c",
        "| | * b",
        "* | | a",
        "|_|/",
        "|/",
        "* r",
    ]


def test_unrelated_histories_do_not_touch() -> None:
    assert drawn(("b", ""), ("a", "")) == ["* b", "* a"]


def test_the_end_of_a_history_moves_the_lanes_beside_it() -> None:
    assert drawn(("b", ""), ("x", "w"), ("w", "")) == ["* b", "* x", "* w"]
    assert drawn(("h", "ab"), ("b", ""), ("a", "")) == [
        "*   h",
        "|\\",
        "| * b",
        "* a",
    ]
