"""Blocks hold for their own code: tasks, threads, generators, and blocks that are closed in any order."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from deltaw.errors import AdapterError
from deltaw.layers.blocks import Blocks


class Chosen:
    """Blocks with the with-statement and the question that routes give them."""

    def __init__(self) -> None:
        self.blocks = Blocks()
        self.outside: Any = "outside"

    @contextlib.contextmanager
    def using(self, choice: Any) -> Iterator[None]:
        block = self.blocks.enter(choice)
        try:
            yield
        finally:
            self.blocks.leave(block)

    def use(self, choice: Any) -> None:
        if not self.blocks.choose(choice):
            self.outside = choice

    def now(self) -> Any:
        block = self.blocks.here()
        return self.outside if block is None else block.choice


@pytest.fixture
def chosen() -> Iterator[Chosen]:
    it = Chosen()
    yield it
    assert it.now() == it.outside
    assert not it.blocks.of_frame


def test_blocks_nest_and_another_kind_is_not_concerned(chosen: Chosen) -> None:
    other = Chosen()
    with chosen.using("a"):
        assert (chosen.now(), other.now()) == ("a", "outside")
        with chosen.using(None), other.using("x"):
            assert (chosen.now(), other.now()) == (None, "x")
            chosen.use("b")
            assert chosen.now() == "b"
        assert chosen.now() == "a"
    assert chosen.now() == "outside" and chosen.blocks.choices() == []


def test_coroutines_side_by_side(chosen: Chosen) -> None:
    async def request(name: str) -> list[Any]:
        seen = [chosen.now()]
        with chosen.using(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(chosen.now())
            chosen.use(name * 2)
            await asyncio.sleep(0)
            seen.append(chosen.now())
        await asyncio.sleep(0)
        return [*seen, chosen.now()]

    async def main() -> None:
        for name, seen in zip("abc", await asyncio.gather(*map(request, "abc")), strict=True):
            assert seen == ["outside", name, name, name, name * 2, "outside"]

    asyncio.run(main())


def test_what_a_block_starts_is_in_it(chosen: Chosen) -> None:
    async def later(ready: asyncio.Event) -> Any:
        await ready.wait()
        first = chosen.now()
        chosen.use("own")
        await asyncio.sleep(0)
        return first, chosen.now()

    async def main() -> None:
        ready = asyncio.Event()
        with chosen.using("a"):
            task = asyncio.create_task(later(ready))
            assert await asyncio.to_thread(chosen.now) == "a"
            plain: list[Any] = []
            thread = threading.Thread(target=lambda: plain.append(chosen.now()))
            thread.start()
            thread.join()
            called = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(lambda: called.set_result(chosen.now()))
            assert plain == ["outside"] and await called == "a"
            await asyncio.sleep(0)
        ready.set()  # it goes on after the block, as contextvars have it, and switches for itself alone
        assert await task == ("a", "own")
        assert chosen.now() == "outside"

    asyncio.run(main())
    with chosen.using("b"):
        asyncio.run(main_sees(chosen, "b"))
        assert chosen.now() == "b"


async def main_sees(chosen: Chosen, name: str) -> None:
    assert chosen.now() == name
    chosen.use("inner")
    assert chosen.now() == "inner"


def test_a_generators_block_is_its_own(chosen: Chosen) -> None:
    def stream(name: str) -> Iterator[Any]:
        yield chosen.now()
        with chosen.using(name):
            for _ in range(3):
                yield chosen.now()
        yield chosen.now()

    a, b = stream("a"), stream("b")
    assert [next(a), next(b), chosen.now(), next(a), chosen.now(), next(b)] == [
        "outside", "outside", "outside", "a", "outside", "b",
    ]  # fmt: skip
    with chosen.using("c"):
        assert [next(a), chosen.now(), next(b), chosen.now()] == ["a", "c", "b", "c"]
        chosen.use("d")
        assert [next(a), next(b), chosen.now()] == ["a", "b", "d"]
        assert [next(a), chosen.now()] == ["d", "d"]  # its block is over: its caller's holds
        b.close()
        assert chosen.now() == "d"


def test_generators_within_generators_and_in_other_threads(chosen: Chosen) -> None:
    def inner() -> Iterator[Any]:
        with chosen.using("inner"):
            yield chosen.now()
            yield chosen.now()

    def outer() -> Iterator[Any]:
        with chosen.using("outer"):
            yield from inner()
            nested = inner()
            yield next(nested), chosen.now()
        yield chosen.now()

    steps = outer()
    seen: list[Any] = []

    def step() -> None:
        seen.append(next(steps))

    for _ in range(4):  # as servers do that drive a generator from a pool of threads, each time in a copied context
        thread = threading.Thread(target=contextvars.copy_context().run, args=(step,))
        thread.start()
        thread.join()
        assert chosen.now() == "outside"
    assert seen == ["inner", "inner", ("inner", "outer"), "outside"]
    steps.close()
    gc.collect()


def test_a_context_manager_hands_its_block_on(chosen: Chosen) -> None:
    @contextlib.contextmanager
    def mine(name: str) -> Iterator[None]:
        with chosen.using(name):
            yield

    def within(name: str) -> Iterator[None]:
        with chosen.using(name):
            yield

    @contextlib.contextmanager
    def delegating(name: str) -> Iterator[None]:
        yield from within(name)

    class Entered:
        def __enter__(self) -> None:
            self.block = chosen.using("class")
            self.block.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.block.__exit__(None, None, None)

    @mine("decorated")
    def decorated() -> Any:
        return chosen.now()

    with mine("a"):
        assert chosen.now() == "a"
        with delegating("b"):
            assert chosen.now() == "b"
            with Entered():
                assert chosen.now() == "class"
            assert decorated() == "decorated"
        with contextlib.ExitStack() as stack:
            stack.enter_context(mine("c"))
            assert chosen.now() == "c"
            kept = stack.pop_all()
        assert chosen.now() == "c"
        kept.close()
        assert chosen.now() == "a"

    def generator() -> Iterator[Any]:
        with mine("g"):
            yield chosen.now()

    steps = generator()
    assert next(steps) == "g" and chosen.now() == "outside"
    steps.close()


def test_asynchronous_generators_and_context_managers(chosen: Chosen) -> None:
    async def stream(name: str) -> AsyncIterator[Any]:
        with chosen.using(name):
            yield chosen.now()
            await asyncio.sleep(0)
            yield await asyncio.to_thread(chosen.now)  # started while it awaits
            yield await asyncio.create_task(now())

    async def now() -> Any:
        await asyncio.sleep(0)
        return chosen.now()

    @contextlib.asynccontextmanager
    async def mine(name: str) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        with chosen.using(name):
            yield

    async def consumer(name: str) -> None:
        async for seen in stream(name):
            assert (seen, chosen.now()) == (name, "outside")
            await asyncio.sleep(0)
            assert chosen.now() == "outside"
        async with mine(name), contextlib.AsyncExitStack() as stack:
            assert await now() == name
            await stack.enter_async_context(mine(name * 2))
            await asyncio.sleep(0)
            assert chosen.now() == name * 2
        assert chosen.now() == "outside"

    async def main() -> None:
        await asyncio.gather(*map(consumer, "abc"))

    asyncio.run(main())


def test_what_is_started_beside_a_paused_generator_is_told_that_it_cannot_know(chosen: Chosen) -> None:
    async def stream() -> AsyncIterator[Any]:
        with chosen.using("a"):
            yield 1
            yield 2

    def plain() -> Iterator[Any]:
        with chosen.using("b"):
            yield 1

    async def main() -> None:
        steps = stream()
        await anext(steps)
        with pytest.raises(AdapterError, match="cannot be told"):
            await asyncio.to_thread(chosen.now)
        with chosen.using("own"):
            assert await asyncio.to_thread(chosen.now) == "own"
        await steps.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    steps = plain()
    next(steps)
    context = contextvars.copy_context()
    seen: list[Any] = []

    def ask() -> None:
        with pytest.raises(AdapterError, match="Open a using or route block in the task or thread itself"):
            chosen.now()
        seen.append(True)

    thread = threading.Thread(target=context.run, args=(ask,))
    thread.start()
    thread.join()
    assert seen == [True]
    steps.close()


def test_a_coroutine_that_is_driven_by_hand(chosen: Chosen) -> None:
    class Pause:
        def __await__(self) -> Iterator[None]:
            yield

    async def request(name: str) -> Any:
        with chosen.using(name):
            await Pause()
            return chosen.now()

    a, b = request("a"), request("b")
    a.send(None)
    assert chosen.now() == "outside"
    b.send(None)
    for coroutine, name in ((a, "a"), (b, "b")):
        with pytest.raises(StopIteration) as ended:
            coroutine.send(None)
        assert ended.value.value == name and chosen.now() == "outside"


def test_blocks_are_closed_in_any_order_and_anywhere(chosen: Chosen) -> None:
    first, second = chosen.using("a"), chosen.using("b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen.now() == "b"
    second.__exit__(None, None, None)
    assert chosen.now() == "outside"

    elsewhere = chosen.using("c")
    elsewhere.__enter__()
    thread = threading.Thread(target=elsewhere.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert chosen.now() == "outside"

    def abandoned() -> Iterator[None]:
        with chosen.using("d"):
            yield

    def abandon() -> None:
        steps = abandoned()
        next(steps)
        with chosen.using("e"):
            del steps
            gc.collect()
            assert chosen.now() == "e"

    thread = threading.Thread(target=abandon)
    thread.start()
    thread.join()
    abandon()
    assert chosen.blocks.choices() == []


def test_what_is_closed_in_another_context_is_over_where_it_was_opened(chosen: Chosen) -> None:
    """Tasks and threads have copies of the context, in which the block is too."""

    async def stream() -> AsyncIterator[Any]:
        with chosen.using("a"):
            yield chosen.now()

    async def later() -> Any:
        await asyncio.sleep(0.05)
        return chosen.now()

    async def main(how: str) -> None:
        block = chosen.using("b")
        block.__enter__()
        if how == "generator":
            async for seen in stream():
                assert seen == "a"
                break
            gc.collect()
            await asyncio.sleep(0.01)  # asyncio closes what nobody goes on with, in a task of its own
            assert chosen.now() == "b"
            block.__exit__(None, None, None)
        elif how == "task":
            started = asyncio.create_task(later())

            async def close() -> Any:
                block.__exit__(None, None, None)
                return chosen.now()

            assert await asyncio.create_task(close()) == "outside"
            assert chosen.now() == "outside"
            assert await started == "b"
        else:
            await asyncio.to_thread(block.__exit__, None, None, None)
        assert chosen.now() == "outside"
        with chosen.using("c"):
            assert chosen.now() == "c"
        assert chosen.now() == "outside"

    for how in ("generator", "task", "thread"):
        asyncio.run(main(how))
    block = chosen.using("d")
    block.__enter__()
    contextvars.copy_context().run(block.__exit__, None, None, None)
    assert chosen.now() == "outside" and chosen.blocks.choices() == []


def test_a_generator_is_collected_while_blocks_are_looked_at(chosen: Chosen) -> None:
    """What closes a block may run wherever memory is asked for, also where the same thread holds the blocks."""

    def abandoned() -> Iterator[None]:
        with chosen.using("a"):
            yield

    def collect() -> None:
        steps = abandoned()
        next(steps)
        with chosen.blocks.lock:
            del steps

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and chosen.blocks.choices() == []
