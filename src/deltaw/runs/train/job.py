"""A run whose adapter is attached: how it is prepared, and how its adapter is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.config import to_mapping
from deltaw.errors import ConfigError, shown
from deltaw.files import store
from deltaw.layers.kinds import in_few_bits
from deltaw.layers.ops.seeding import seeded
from deltaw.layers.processes import shards
from deltaw.layers.processes.ranks import ALONE, Ranks
from deltaw.layers.processes.shards import blocks_of
from deltaw.layers.tree import base_modules, is_finite
from deltaw.methods.full import Full
from deltaw.methods.registry import name_of
from deltaw.model import attach
from deltaw.model.ends import teach
from deltaw.model.summary import parameters, updates
from deltaw.progress import say
from deltaw.runs.resume.identity import differing, identity
from deltaw.runs.resume.place import RunFolder
from deltaw.training.keeper import Kept
from deltaw.training.loop import peak_memory
from deltaw.training.prepare import Prepared


@dataclass(frozen=True)
class Job:
    """A run whose adapter is attached."""

    prepared: Prepared
    folder: RunFolder
    """The folder of its files while it is trained."""
    adapter: str
    """The adapter's name on the model."""
    settings: dict[str, object]
    """The settings in config.yaml."""
    identity: dict[str, Any]
    """Settings, base and records, without which its state does not go on."""
    together: Sequence[object] = ()
    """The runs that are trained over the model at once, which share passes."""
    kept: Kept | None = None
    """The state to go on from."""
    notes: tuple[str, ...] = ()
    """Sentences to tell as it begins."""
    ranks: Ranks = ALONE
    """The processes that train it."""

    @property
    def is_dealt(self) -> bool:
        """True where the base is dealt out over the processes: each of them then takes part in whatever the model computes."""
        return self.prepared.config.shard == "full"

    @property
    def fellows(self) -> Ranks:
        """The processes that compute all that this one does; ALONE where each has the model whole."""
        return self.ranks if self.is_dealt else ALONE

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.prepared.loaded.model
        return model


def attached(
    prepared: Prepared, name: str, folder: RunFolder, together: Sequence[object] = (), ranks: Ranks = ALONE
) -> Job:
    """Attach the adapter, drawn from the run's seed, and teach it the tokens that end its records."""
    model, config, settings = prepared.loaded.model, prepared.config, _settings(prepared)
    if config.shard == "full":
        _check_shards(prepared, ranks)
    known = identity(prepared, settings, ranks.count)
    with seeded(config.seed):
        attach.attach(model, prepared.method, name=name)
    teach(model, name, prepared.encoded.ends)
    return Job(prepared, folder, name, settings, known, together, ranks=ranks)


def _check_shards(prepared: Prepared, ranks: Ranks) -> None:
    """Raise ConfigError for a run whose base cannot be dealt out over its processes."""
    model, config, problems = prepared.loaded.model, prepared.config, []
    if ranks.count == 1:
        problems.append(
            "shard: full deals the base out over several processes: start them with torchrun --nproc-per-node N"
        )
    if config.frozen_dtype == "int8":
        problems.append(
            "frozen_dtype: int8 keeps weights of its own, which are not dealt out: leave one of the two out"
        )
    if isinstance(prepared.method, Full):
        problems.append(f"method: {name_of(prepared.method)} trains the base's weights themselves, which stay whole")
    if config.share == "group":
        problems.append(
            "share: group computes less for records that begin alike, which shard: full does not: leave one out"
        )
    if few := [name for name, module in base_modules(model) if in_few_bits(module, "weight")]:
        problems.append(f"weights of few bits are not dealt out ({shown(few)}): load the base in --dtype bfloat16")
    if not blocks_of(model):
        problems.append(f"a {type(model).__name__} has no stack of blocks that its weights could be dealt out by")
    if problems:
        raise ConfigError("The base cannot be dealt out (--shard full):", problems)


def deal_out(job: Job) -> None:
    """Deal the frozen base out over the processes, block by block. What is trained stays whole in each."""
    model = job.model
    store.remember_base(model, job.adapter)
    trained = parameters(model, job.adapter)
    shards.deal_out(model, trained, next(model.parameters()).device)


def _settings(prepared: Prepared) -> dict[str, object]:
    """Return what config.yaml holds: the command's own keys, so that `deltaw train --config` takes it as it is.

    Raises ConfigError for names that it cannot hold.
    """
    source, count = prepared.source, len(prepared.encoded.examples)
    data = source if isinstance(source, (str, Path)) else f"<{count} records in memory>"
    named = {"model": prepared.loaded.name, "data": str(data), "method": name_of(prepared.method)}
    settings = {**named, **to_mapping(prepared.method), **to_mapping(prepared.config)}
    if wrong := [key for key, value in settings.items() if not _is_text(value)]:
        raise ConfigError(
            "A run's files cannot hold these names, which are not UTF-8:",
            [f"{key}: {settings[key]!r}" for key in wrong],
            "Rename them, or name them through a link.",
        )
    return settings


def _is_text(value: object) -> bool:
    """Return whether UTF-8 can hold a value: names of files may have any bytes."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def begin_with(job: Job) -> None:
    """Give the adapter the values of the one that the run is to begin with. Raises ConfigError where they are of other shapes."""
    start = job.prepared.config.start
    if start is None:
        return
    name = store.load(job.model, start, name=f"{job.adapter} begins with", activate=False)
    try:
        source, target = (_values(job.model, adapter) for adapter in (name, job.adapter))
        sizes, asked = ({key: (tuple(t.shape), scale) for key, (t, scale) in v.items()} for v in (source, target))
        if problems := differing(sizes, asked):
            raise ConfigError(
                f"The run cannot begin with {start}:",
                problems,
                "Give it the adapter's method, --rank, --alpha and --targets.",
            )
        with torch.no_grad():
            for key, (tensor, _) in target.items():
                tensor.copy_(source[key][0])
    finally:
        attach.detach(job.model, name)


def _values(model: nn.Module, name: str) -> dict[str, tuple[nn.Parameter, float | None]]:
    """Return layer and name of each trained tensor of an adapter → the tensor, and the scale of its update."""
    return {
        f"{layer} {key}": (tensor, getattr(update, "scale", None))
        for layer, update in updates(model, name).items()
        for key, tensor in update.named_parameters()
    }


def values_are_finite(job: Job) -> bool:
    """Return whether all trained values of the adapter are finite."""
    return all(is_finite(p) for p in parameters(job.model, job.adapter))


def save(job: Job, step: int) -> None:
    """Save the adapter as it is after `step` steps, in the first process."""
    if not job.ranks.is_first:
        return
    say("saving the adapter")
    loaded = job.prepared.loaded
    tokenizer = loaded.tokenizer if loaded.handed_over else None
    store.save(
        job.model,
        job.folder.adapter,
        name=job.adapter,
        training=job.settings | {"steps_taken": step},
        tokenizer=tokenizer,
    )


def peak(job: Job) -> int:
    """Return the most bytes that the run has held, in whatever process."""
    return max(peak_memory(), job.kept.about["peak_memory"] if job.kept else 0)


def resumed_at(job: Job) -> list[int]:
    """Return the steps after which the run was resumed."""
    return [*job.kept.about["resumed"], job.kept.saved.step] if job.kept else []
