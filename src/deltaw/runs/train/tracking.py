"""Trackers of experiments that hear of a run, through accelerate: TensorBoard, Weights & Biases, MLflow, Trackio and others."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, TrainError, first_line
from deltaw.runs.results.train import HeldOutScores
from deltaw.training.events import Evaluated, Event, Stepped, Warned

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "comet_ml": ("comet_ml",)}
"""Tracker → packages of which it needs one, where they are not called as it is."""


class Trackers:
    """The trackers of one run. Where one fails while the run goes on, it is told no more, and the run is not lost."""

    def __init__(self, started: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._started = dict(started)
        self._warn = warn

    def hear(self, event: Event) -> None:
        """Tell of an event: the figures of a step, or of an evaluation."""
        if isinstance(event, Stepped):
            named = ("loss", "lr", "grad_norm", "tokens_per_second", "memory")
            self._log({f"train/{name}": getattr(event, name) for name in named}, event.step)
        elif isinstance(event, Evaluated):
            self._log({"held_out/loss": event.valid_loss, "held_out/accuracy": event.accuracy}, event.step)

    def scores(self, scored: HeldOutScores | None, step: int) -> None:
        """Tell of the scores of the adapter that was kept."""
        if scored is not None:
            self._log({f"kept/{name}": score.value for name, score in scored.scores.items()}, step)

    def _log(self, values: Mapping[str, float | None], step: int) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.log(known, step=step))

    def close(self) -> None:
        """Let the trackers write what they have not yet."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, tell: Callable[[Any], object]) -> None:
        for name, tracker in list(self._started.items()):
            try:
                tell(tracker)
            except Exception as error:  # of whatever package: a tracker never costs a run
                del self._started[name]
                self._warn(f"{name} is told no more of this run: {first_line(error)}")


def trackers_of(asked: str) -> list[str]:
    """Return the trackers' names. Raises ConfigError for those that are unknown or not installed, with all of them.

    asked: names with commas, "none", or "auto" for TensorBoard where it is installed.
    """
    if asked == "none":
        return []
    if asked == "auto":
        return ["tensorboard"] if _is_there("accelerate") and _is_there("tensorboard") else []
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    if not _is_there("accelerate"):
        raise ConfigError(
            f"track is {asked}: trackers are reached through accelerate. Install it: pip install accelerate"
        )
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import LoggerType

    # Those that a program has registered are no packages
    known, packages = {str(name) for name in LOGGER_TYPE_TO_CLASS}, set(LoggerType.list())
    problems = [f"{name}: there is no such tracker ({', '.join(sorted(known))})" for name in names if name not in known]
    problems += [
        f"{name} is not installed: pip install {name}"
        for name in names
        if name in known & packages and not _is_there(name)
    ]
    if problems:
        raise ConfigError("track cannot be used so:", problems)
    return names


def _is_there(name: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in _PACKAGES.get(name, (name,)))


def both(first: Callable[[Event], None], second: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return what passes an event to both."""

    def hear(event: Event) -> None:
        first(event)
        second(event)

    return hear


@contextlib.contextmanager
def tracked(
    names: list[str], run: str, folder: Path, settings: Mapping[str, object], hear: Callable[[Event], None]
) -> Iterator[Trackers]:
    """Start trackers and yield them.

    Args:
        names: those of `trackers_of`.
        run: the run's name, as it is shown.
        folder: where those that write files do.
        settings: what is stored with the run.
        hear: told of a tracker that fails.

    Raises:
        TrainError: a tracker cannot be started. Nothing is trained.
    """
    started: dict[str, Any] = {}
    if names:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()
        }
        for name in names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            try:
                tracker = cls(run, logging_dir=folder) if cls.requires_logging_directory else cls(run)
                tracker.start()
                tracker.store_init_configuration(plain)
            except Exception as error:
                raise TrainError(
                    f"{name} could not be started: {first_line(error)}\nMend that, or train with --track none."
                ) from error
            started[name] = tracker
    trackers = Trackers(started, lambda text: hear(Warned(0, text)))
    try:
        yield trackers
    finally:
        trackers.close()
