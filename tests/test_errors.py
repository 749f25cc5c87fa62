"""The tree of errors: what its docstring promises is what the classes are, and messages hold every problem."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from deltaw import errors
from deltaw.errors import DeltaWError, first_line, listing, nearest

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, DeltaWError)]


def documented() -> dict[str, tuple[int, int]]:
    """name → (depth in the drawn tree, exit code)."""
    lines = [re.match(r"^([ │├└─]*)(\w+) +exit (\d+)", line) for line in (errors.__doc__ or "").splitlines()]
    return {m[2]: ((len(m[1]) - 4) // 4, int(m[3])) for m in lines if m}


def test_the_docstring_draws_exactly_the_classes_there_are() -> None:
    tree = documented()
    assert set(tree) == {c.__name__ for c in CLASSES}
    for cls in CLASSES:
        assert tree[cls.__name__] == (cls.__mro__.index(DeltaWError), cls.exit_code), cls.__name__


def test_every_exit_code_says_failure() -> None:
    assert all(0 < c.exit_code < 256 for c in CLASSES)


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("q_prj", ["q_proj", "k_proj", "mlp"], "did you mean 'q_proj'"),
        ("zzz", ["q_proj"], ""),
        ("lr", [], ""),
    ],
)
def test_nearest_names_what_is_close_and_nothing_else(word: str, known: list[str], hint: str) -> None:
    found = nearest(word, known)
    assert hint in found if hint else found == ""


def test_a_listing_holds_every_problem_or_says_how_many_more() -> None:
    assert listing("Bad:", ["a", "b"]) == "Bad:\n  - a\n  - b"
    long = listing("Bad:", [f"problem {i}" for i in range(25)])
    assert long.count("\n  - ") == 20 and "5 more" in long


def test_problems_are_kept_as_they_were_given() -> None:
    error = DeltaWError("Bad:", ["a", "b\nand its reason"], "Do this.")
    assert error.problems == ["a", "b\nand its reason"]
    assert str(error) == "Bad:\n  - a\n  - b\nand its reason\nDo this."
    assert DeltaWError("One thing.").problems == ["One thing."]
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


@pytest.mark.parametrize(
    ("text", "line"), [("\n  first \nsecond", "first"), ("", "ValueError"), ("x" * 999, "x" * 300)]
)
def test_the_first_line_is_one_that_says_something(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


@pytest.mark.parametrize(
    ("word", "hint"),
    [("adamw", " (did you mean 'AdamW'?)"), ("adamw_torch", " (did you mean 'AdamW'?)"), ("LR", " (did you mean 'lr'?)"),
     ("cosine_with_restarts", " (did you mean 'cosine'?)"), ("consine", " (did you mean 'cosine' or 'constant'?)"), ("xyz", "")],
)  # fmt: skip
def test_the_nearest_name_is_found_in_any_capitals_and_by_its_beginning(word: str, hint: str) -> None:
    assert nearest(word, ["AdamW", "Adam", "RAdam", "cosine", "constant", "lr"]) == hint
