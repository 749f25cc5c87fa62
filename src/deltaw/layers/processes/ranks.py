"""The processes of a run, which `torchrun` or `accelerate launch` starts. Each computes its part of a step's records.

All hold the same adapter. The gradients of A and B are few, so one sum over all processes after the backward pass is all that a
step needs; nothing of the base is exchanged. What depends on a clock or a signal is decided by all together: they would part
ways otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from deltaw import errors
from deltaw.errors import ConfigError, DeltaWError, Interrupted, NotFinite, TrainError, first_line

_Value = TypeVar("_Value")
_Row = TypeVar("_Row")

_PATIENCE = timedelta(hours=2)
"""Time that processes wait for one another: the first one alone writes reports and answers prompts meanwhile."""
_SAYING = timedelta(seconds=5)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def part(self, rows: Sequence[_Row]) -> Sequence[_Row]:
        """Return this process's share of the rows: neighbours, so that those that begin alike mostly stay together.

        The first process has some wherever there are any.
        """
        start, stop = (math.ceil(len(rows) * rank / self.count) for rank in (self.rank, self.rank + 1))
        return rows[start:stop]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.count > 1:
            with as_lost():
                dist.all_reduce(tensor)
        return tensor

    def total(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over all processes."""
        return list(numbers) if self.count == 1 else self.add_up(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def any(self, here: bool) -> bool:
        """Return whether it is so in any process."""
        return bool(self.total(here)[0])

    def most(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        return number if self.count == 1 else max(self._gathered(number))

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Turn the error of a pass of the model that needs all processes, where one is gone, into Lost."""
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and _is_of_engine(error):
                with as_lost():
                    raise
            raise

    def of_first(self, number: float) -> float:
        """Return the first process's number, for example of its clock."""
        return self.total(number if self.is_first else 0.0)[0]

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the first process's values, in place."""
        if self.count > 1:
            with as_lost():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def by_first(self, work: Callable[[], _Value]) -> _Value:
        """Return what `work` returns in the first process, which alone does it. All raise the error of ours that it raises."""
        if self.count == 1:
            return work()
        value: _Value = self._settled([self.from_first(_outcome(work) if self.is_first else None)])
        return value

    def from_first(self, value: _Value | None) -> _Value:
        """Return the first process's value; the others give None."""
        return cast(_Value, value if self.count == 1 else self._gathered(value)[0])

    def together(self, work: Callable[[], _Value]) -> _Value:
        """Return what `work` returns in this process, once all have done it. Where any raises an error of ours, all do."""
        if self.count == 1:
            return work()
        here = _outcome(work)
        self._settled(self._gathered(here if here.error is not None else _Outcome(None)))
        value: _Value = here.value
        return value

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise ConfigError where a process has other values than the first."""
        if self.count == 1:
            return
        first, *others = self._gathered(values)
        wrong = [
            f"process {rank}: other {', '.join(sorted(key for key in values if there[key] != first[key]))}"
            for rank, there in enumerate(others, start=1)
            if there != first
        ]
        if wrong:
            raise ConfigError("The processes of this run must all have what the first has:", wrong)

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        with as_lost():
            dist.all_gather_object(values, value)
        return values

    def _settled(self, outcomes: Sequence[_Outcome]) -> Any:
        """Return the first outcome's value. Raises the first error that there is."""
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                raise outcome.error.raised(rank, self)
        return outcomes[0].value


ALONE = Ranks()
"""The run has one process."""


class Lost(TrainError):
    """Another process of the run has ended before its work was done."""


@dataclass(frozen=True)
class _Outcome:
    """The end of a piece of work in one process, as it is sent to the others."""

    value: Any
    error: _Sent | None = None


@dataclass(frozen=True)
class _Sent:
    """An error of ours on its way to other processes."""

    kind: str
    text: str
    problems: Sequence[str]
    exit_code: int

    def raised(self, rank: int, here: Ranks) -> DeltaWError:
        """Return the error, to be raised in each process. One that another tells of is marked: it need not be told again."""
        kind: type[DeltaWError] = getattr(errors, self.kind, DeltaWError)
        error = kind(self.text if rank == 0 else f"In process {rank} of {here.count}: {self.text}")
        error.problems, error.exit_code, error.is_told = list(self.problems), self.exit_code, not here.is_first
        return error


def _outcome(work: Callable[[], object]) -> _Outcome:
    try:
        return _Outcome(work())
    except Lost:
        raise
    except DeltaWError as error:
        return _Outcome(None, _Sent(type(error).__name__, str(error), error.problems, error.exit_code))


_ENGINE = re.compile(r"^\[\S+\] |\.( .*)?$")
"""The place in its own code, and advice, in an error of gloo."""


@contextlib.contextmanager
def as_lost() -> Iterator[None]:
    """Turn the engine's error where another process is gone into ours."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        raise Lost(
            f"Another process of this run has ended, or does not answer any more: {_ENGINE.sub('', first_line(error))}. What it "
            "said stands above, if it said anything: one that was killed, for want of memory for example, says nothing."
        ) from error


def _is_of_engine(error: RuntimeError) -> bool:
    """Return whether the error is one of what carries tensors between processes; gloo's have no class of their own."""
    return isinstance(error, dist.DistBackendError) or any(
        word in str(error) for word in ("gloo", "closed by peer", "NCCL")
    )


# --- starting and ending ------------------------------------------------------------------------------------------


def are_several() -> bool:
    """Return whether a launcher started this process as one of several, or the caller's program has joined them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or are_joined()


def are_joined() -> bool:
    """Return whether this process knows the others: without them nothing is exchanged or dealt out."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Yield this process's place among those of the run, which a launcher has started; ALONE where there is one.

    Each takes the GPU of its LOCAL_RANK. Processes that the caller's program has joined stay so.

    Raises ConfigError where the launcher asks for what is not read, and TrainError where the others cannot be reached.
    """
    if not are_several():
        yield ALONE
        return
    _check_launcher()
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TrainError(
            f"The other processes of this run cannot be reached: {first_line(error)}\nStart them with torchrun "
            "--nproc-per-node N -m deltaw train …"
        ) from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        with _leaving(ranks), _warned_by_first(ranks):
            yield ranks
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _warned_by_first(ranks: Ranks) -> Iterator[None]:
    """Let the first process alone warn."""
    log = logging.getLogger("deltaw")
    level = log.level
    if not ranks.is_first:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


_OF_ALL = (NotFinite, Interrupted)
"""Errors that all processes come to alike."""


@contextlib.contextmanager
def _leaving(ranks: Ranks) -> Iterator[None]:
    """Leave with the others: a launcher ends all when one ends in an error, and the first may still be writing.

    An error is told by one process: what all come to by the first, any other by the one that says it first.
    """
    try:
        yield
    except _OF_ALL as error:
        error.is_told = not ranks.is_first
        _wait_for_all()
        raise
    except DeltaWError as error:
        if not error.is_told:
            if not ranks.is_first:
                time.sleep(_SAYING.total_seconds() / 2)  # the first has more to say, if it is there
            error.is_told = not _is_first_to_say("lost" if isinstance(error, Lost) else str(error))
        raise
    except KeyboardInterrupt:
        if ranks.is_first:
            raise
        stopped = Interrupted("Stopped.")
        stopped.is_told = True
        raise stopped from None
    _wait_for_all()


def _wait_for_all() -> None:
    with contextlib.suppress(Lost), as_lost():
        dist.barrier()


def _is_first_to_say(text: str) -> bool:
    """Return whether no other process of the run has said this."""
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_SAYING
        )
        return bool(store.add(f"deltaw said {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # what is said twice is better than what is never said
        return True


_NOT_READ = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_TP": "--use_tp",
}
"""The variable that accelerate sets → its flag."""


def _check_launcher() -> None:
    """Raise ConfigError where accelerate was asked for a way to train that would silently be plain data parallelism."""
    if asked := [flag for name, flag in _NOT_READ.items() if os.environ.get(name, "false").lower() in ("true", "1")]:
        error = ConfigError(
            f"accelerate was asked for {', '.join(asked)}, which deltaw does not read: each process would hold the whole model. "
            "Leave it out; --shard full deals the base out over the processes."
        )
        error.is_told = os.environ.get("RANK", "0") != "0"
        raise error
