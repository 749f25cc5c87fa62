"""A route by itself, without a model: passes that begin and end, blocks, threads, backward passes."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deltaw.errors import AdapterError
from deltaw.layers.ops.rows import Rows
from deltaw.layers.routing import UNSET, Pass, Route, names_of


def in_thread(act: Callable[[], Any]) -> Any:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(act()))
    thread.start()
    thread.join()
    return seen[0]


def frame_here() -> Any:
    """That of a call which is over when it is looked at."""
    return sys._getframe()


def test_passes_within_passes_end_in_any_way() -> None:
    route = Route("x")
    a, b, c = (route.push(None, name, kept={"of": name}) for name in "abc")
    assert (route.chosen(), route.kept()) == ("c", {"of": "c"}) and route.held() == {"a", "b", "c"}
    assert in_thread(route.chosen) == "x"
    route.pop(c)
    assert (route.chosen(), route.kept()) == ("b", {"of": "b"}) and route.held() == {"a", "b"}
    c, d = (route.push(None, name) for name in "cd")
    route.pop(b)  # and what is within it
    assert (route.chosen(), route.kept()) == ("a", {"of": "a"}) and route.held() == {"a"}
    for over in (d, b):  # already
        route.pop(over)
        assert route.chosen() == "a"
    route.pop(a)
    assert (route.chosen(), route.kept()) == ("x", None) and route.held() == set() and not route.running


def test_a_pass_is_over_with_its_frame() -> None:
    assert not Pass("a", None, None, None).is_over()
    assert not Pass("a", sys._getframe(), None, None).is_over()
    assert Pass("a", frame_here(), None, None).is_over()
    route = Route()
    route.push(None, "a", sys._getframe())
    route.push(None, "b", frame_here())  # was interrupted
    route.push(None, "c", sys._getframe())
    assert route.held() == {"a", "c"}
    assert route.current() == "a" and route.chosen() == "a"
    assert route.held() == {"a"}


def test_what_all_rows_have_is_the_choice_of_code_that_is_no_layer() -> None:
    route, alike, mixed = Route(), Rows(["a", "a"]), Rows(["a", None])
    for rows, expected in ((alike, "a"), (Rows(["b"]), "b"), (Rows([None]), None), (mixed, mixed)):
        with route.block(rows):
            assert route.current() == expected and route.chosen() is rows


def test_names_of_choices() -> None:
    assert names_of(Rows(["b", None, "a", "b"])) == {"a", "b"}
    assert names_of("a") == {"a"}
    assert names_of(None) == names_of(UNSET) == set()


def test_a_switch_is_for_its_block_and_so_is_what_a_compiler_reads() -> None:
    route = Route("x")

    def holds(choice: Any) -> None:
        assert route.chosen() == route._traced() == choice

    holds("x")
    with route.block("a"):
        holds("a")
        route.choose("b")
        holds("b")
        with route.block(None):
            holds(None)
            assert route.held() == {"b"}
        holds("b")
        assert in_thread(lambda: (route.chosen(), route._traced())) == ("x", "x")
    holds("x")
    route.choose("y")
    holds("y")
    assert in_thread(lambda: (route.chosen(), route._traced())) == ("y", "y")

    def stream() -> Iterator[None]:
        with route.block("g"):
            holds("g")
            yield
            holds("g")
            yield

    steps = stream()
    for _ in range(2):
        next(steps)
        holds("y")
    steps.close()


@pytest.mark.parametrize("closed", ["here", "elsewhere"])
def test_a_block_that_is_closed_by_another_thread_leaves_that_ones_own(closed: str) -> None:
    route = Route("x")
    outer, inner = route.block("a"), route.block("b")

    def opened() -> None:
        outer.__enter__()
        inner.__enter__()

    def traced_after_closing() -> Any:
        inner.__exit__(None, None, None)
        return route._traced()

    (in_thread if closed == "here" else lambda act: act())(opened)
    assert (in_thread if closed == "elsewhere" else lambda act: act())(traced_after_closing) == "x"
    outer.__exit__(None, None, None)


def test_a_block_in_a_pass_is_for_what_is_called_in_it() -> None:
    route = Route("x")
    begun = route.push(None, "a", kept={})
    with route.block("b"):
        assert (route.chosen(), route.kept()) == ("b", None)
    assert (route.chosen(), route.kept()) == ("a", {})
    route.pop(begun)
    assert not route.here.passes


def test_what_is_pinned_is_what_holds_now() -> None:
    route = Route("x")
    route.push(None, "a", frame_here())  # was interrupted
    with route.pinned():
        route.active = "y"
        choice, block = route.taken()
        assert choice == "x" and block is not None and block.kept == {}
    assert route.taken() == ("y", None)


def test_a_copy_is_in_no_block_or_pass() -> None:
    route = Route("x")
    route.push(None, "a")
    with route.block("b"):
        for twin in (copy.deepcopy(route), pickle.loads(pickle.dumps(route))):
            assert twin.chosen() == "x" and not twin.held()


def test_a_backward_pass_goes_through_what_its_forward_pass_went_through() -> None:
    route, here = Route("x"), threading.get_ident()
    assert route._forward_of(4) is UNSET
    route.backward[4] = {here: "a", here + 1: "b"}
    assert route._forward_of(4) == "a"
    assert in_thread(lambda: route._forward_of(4)) is UNSET  # two passes' outputs, none come to by this thread
    route.backward[4] = {here: "b", here + 1: "a"}
    assert in_thread(lambda: route._forward_of(4)) is UNSET
    route.backward[5] = {here + 1: None}
    assert route._forward_of(5) is None
    route.backward[6] = {here + 1: "c", here + 2: "c"}
    assert route._forward_of(6) == "c"
    route.here.came = 4, "b"
    assert route._forward_of(7) == "b"  # within one of those
    route.here.came = 8, "b"
    assert route._forward_of(7) is UNSET  # 8 is over


def test_what_is_computed_again_elsewhere_is_refused() -> None:
    route, rows = Route(), Rows(["a", None])
    route._check_again("a")  # after no pass
    for last, now in (("a", "a"), ("a", Rows(["a", "a"])), (None, None), (rows, rows)):
        route.last = last
        route._check_again(now)
    for last, now, said in (
        ("a", None, "went through adapter 'a', this code goes through the base"),
        (None, "b", "went through the base, this code goes through adapter 'b'"),
        (rows, "a", "went through an adapter for each row, this code goes through adapter 'a'"),
    ):
        route.last = last
        with pytest.raises(AdapterError, match=said):
            route._check_again(now)
