"""Records that begin alike as a tree: each row is on its path, and what several share is there once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data import Example, trees
from deltaw.data.trees import Tree, tree_of

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=2, max_size=8)


def of(rows: list[list[int]], padded: int | None = None) -> Tree | None:
    examples = [Example(row, [False] * len(row), str(i)) for i, row in enumerate(rows)]
    return tree_of(examples, 9, sum(map(len, rows)) if padded is None else padded)


@given(rows=ROWS, least=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_rows_are_their_paths(rows: list[list[int]], least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "LEAST", least)
        patch.setattr(trees, "WORTHWHILE", 100.0)
        tree = of(rows)
    if tree is None:
        assert least > 1 or len({row[0] for row in rows}) == len(rows)
        return
    ids, positions = tree.input_ids[0], tree.position_ids[0]
    paths = []
    for row, places in zip(rows, tree.places, strict=True):
        path = places[: len(row)].tolist()
        assert ids[path].tolist() == row and positions[path].tolist() == list(range(len(row)))
        paths.append(path)
    # A token attends to what comes before it in its stretch, and to the stretches that end after it: exactly its path
    for path in paths:
        for n, place in enumerate(path):
            stretches = [s for s in tree.stretches if s.start <= place < s.end]
            assert [p for s in stretches for p in range(s.start, min(s.stop, place + 1))] == path[: n + 1]
    count = len({place for path in paths for place in path})
    assert tree.stretches[-1].stop == ids.numel() == -(-count // trees.MULTIPLE) * trees.MULTIPLE
    prefixes = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
    assert count >= len(prefixes) and (least > 1 or count == len(prefixes))


def test_every_stretch_saves_enough() -> None:
    common, more = list(range(40)), list(range(50, 60))
    tree = of([[*common, *more, 1], [*common, *more, 2], [*common, 3], common, [*common, 4, 5]])
    assert tree is not None
    # Of two rows the ten tokens after the common ones are alike, too few to be shared
    wanted = [(0, 40, 65, 0), (40, 41, 41, 40), (41, 43, 43, 40), (43, 54, 54, 40), (54, 65, 65, 40), (65, 96, 96, 0)]
    assert [tuple(stretch) for stretch in tree.stretches] == wanted
    assert tree.places[3, :40].tolist() == list(range(40))


@pytest.mark.parametrize(
    ("rows", "padded"),
    [
        ([[1, 2, 3], [4, 5, 6]], 16),
        ([[1] * 15 + [2], [1] * 15 + [3]], 32),
        ([[1] * 100], 100),
        ([[1] * 64, [2] * 8, [3] * 8], 192),
        ([[1] * 20 + [2] * 300, [1] * 20 + [3] * 300], 640),
    ],
    ids=["nothing in common", "too little", "a single row", "nothing but padding", "a small share"],
)
def test_there_is_none_where_it_saves_little(rows: list[list[int]], padded: int) -> None:
    assert of(rows, padded) is None
