"""Notices of what a long call is doing now, for a view that draws them. Knows no terminal. Where nobody watches, they go nowhere.

Events (training/events.py, runs/events.py) tell what has happened, and a log keeps them. Notices are finer; nothing keeps them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

_Event = TypeVar("_Event")


@dataclass(frozen=True)
class Phase:
    """The thing that goes on from now on, in words."""

    text: str
    """For example "loading the model"."""
    count: int | None = None
    """Parts that are done, where they are counted."""
    total: int | None = None
    run: str = ""
    """The run that it is part of, of several."""


@dataclass(frozen=True)
class Tick:
    """One optimizer step was taken."""

    step: int
    total_steps: int
    epoch: float
    """Passes over the records so far."""
    loss: float | None
    """Mean over the step's predictions; of a GPU that of the step before. None where it is not known yet."""
    lr: float
    tokens: int
    """In all steps so far, without padding; images of a model of images."""
    step_seconds: float
    """In all steps so far, without evaluations."""
    seconds_left: float
    memory: int
    """Bytes that the process holds now, on the GPU where one is in use."""
    on_gpu: bool = False
    """True where `memory` is a GPU's."""
    run: str = ""
    """The run that took it, of several."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out records were scored."""

    step: int
    loss: float
    accuracy: float | None
    """Share of the records whose class is right; None for tasks without classes."""
    run: str = ""


@dataclass(frozen=True)
class Runs:
    """The number of runs, or of scores, that the call is to come to."""

    count: int
    run: str = ""


@dataclass(frozen=True)
class Stopping:
    """A signal asks the call to stop, and it will after its step."""

    text: str = "stopping after this step"
    run: str = ""


Notice: TypeAlias = Phase | Tick | HeldOut | Runs | Stopping
_KINDS: dict[str, type[Notice]] = {kind.__name__: kind for kind in (Phase, Tick, HeldOut, Runs, Stopping)}


def to_json(notice: Notice) -> dict[str, object]:
    """Return a notice as plain values, for another process."""
    return {"kind": type(notice).__name__, **dataclasses.asdict(notice)}


def from_json(values: Mapping[str, Any]) -> Notice:
    """Return the notice in plain values. Raises KeyError or TypeError where they are none."""
    return _KINDS[values["kind"]](**{name: value for name, value in values.items() if name != "kind"})


# --- who watches --------------------------------------------------------------------------------------------------

_watcher: ContextVar[Callable[[Notice], None] | None] = ContextVar("watcher", default=None)


def is_watched() -> bool:
    """Return whether notices are for anybody: what is only told to a view need not be computed otherwise."""
    return _watcher.get() is not None


def tell(notice: Notice) -> None:
    """Pass a notice on to whoever watches this call."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(notice)


def say(text: str, count: int | None = None, total: int | None = None) -> None:
    """Tell what goes on from now on."""
    tell(Phase(text, count, total))


@contextlib.contextmanager
def watched(by: Callable[[Notice], None]) -> Iterator[None]:
    """Pass all notices of this call to `by`, while open."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def named(names: Callable[[str], str]) -> Iterator[None]:
    """Give the run of each notice another name, while open: for example that of a candidate."""
    outer = _watcher.get()
    if outer is None:
        yield
        return
    with watched(lambda notice: outer(dataclasses.replace(notice, run=names(notice.run)))):
        yield


# --- what draws ---------------------------------------------------------------------------------------------------


class View(Protocol):
    """The drawing of a call's notices and events. While open as a context, it watches."""

    def __enter__(self) -> View: ...

    def __exit__(self, *exception: Any) -> None: ...

    def hear(self, event: Any) -> None:
        """Take up an event."""


_view: Callable[[str], View] | None = None


def draw_with(view: Callable[[str], View]) -> None:
    """Set what opens the view of a public call by its subject. `import deltaw` does so; without it nothing is ever drawn."""
    global _view
    _view = view


@contextlib.contextmanager
def shown(
    progress: bool, subject: str, on_event: Callable[[_Event], None] = lambda event: None
) -> Iterator[Callable[[_Event], None]]:
    """Draw what this call does, while open, unless `progress` is off or the call is part of one that is drawn.

    Yields what takes the call's events: the view, where there is one, then `on_event`.
    """
    if not progress or _view is None or is_watched():
        yield on_event
        return
    with _view(subject) as view:

        def hear(event: _Event) -> None:
            view.hear(event)
            on_event(event)

        yield hear
