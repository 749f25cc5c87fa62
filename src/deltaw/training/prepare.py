"""From MODEL, DATA and settings to what training begins with: the model, encoded records, held-out ones, settings without
`auto`. Trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltaw.config import TrainConfig, from_mapping, keys
from deltaw.data import Encoded, Records, held_out_split, read
from deltaw.data.hold_out import hold_out, sample
from deltaw.data.items import Item
from deltaw.data.prompts import described, overlap
from deltaw.data.sources import is_path, local
from deltaw.errors import AdapterError, ConfigError, DataError, DeltaWError
from deltaw.layers.ops.seeding import seeded
from deltaw.model import summary
from deltaw.model.inputs import settle_padding, vocabulary_size
from deltaw.model.pretrained import HEADED, Pretrained, check_vocabulary, head_of, pad_id, read_config
from deltaw.training.opening import opened, prepared
from deltaw.training.tasks import recognised, task_of

log = logging.getLogger("deltaw")
# Of fewer records none are held out
_FEW = 20
_INSTEAD = "Give held-out records with --valid, or hold out none with --valid-share 0."


@dataclass(frozen=True)
class Prepared:
    """What a run begins with."""

    loaded: Pretrained
    source: Any
    """The data, as it was given."""
    config: TrainConfig
    """With what `auto` came to."""
    method: Any
    """With the head that the model lacked."""
    encoded: Encoded
    valid: Encoded | None
    valid_records: Any
    sets: Sets


@dataclass(frozen=True)
class Sets:
    """What became of the records, for people to read."""

    train: str
    """For example "300 records of 47 prompts"."""
    valid: str | None
    """None where nothing is held out."""
    overlap: str | None
    """A warning where prompts are on both sides."""


@dataclass(frozen=True)
class HeldOut:
    """What a run is scored on."""

    loaded: Pretrained
    config: TrainConfig
    """With what `auto` came to."""
    records: Any
    sets: Sets


def prepare(model: Any, data: Any, config: TrainConfig, method: Any, *, tokenizer: Any = None) -> Prepared:
    """Raises ConfigError, FileError or DataError, each with everything wrong of its kind."""
    begun = _begin(model, data, config, 0 if method is None else method.positions, tokenizer)
    loaded, config = begun.loaded, begun.config
    task = task_of(config.data)
    encoded = task.encode(begun.train, loaded, config.data)
    valid = task.encode(begun.valid, loaded, config.data) if begun.valid is not None else None
    check_ids(loaded, [*encoded.examples, *(valid.examples if valid is not None else ())])
    return Prepared(
        loaded,
        data,
        config,
        with_head(method, loaded.head),
        encoded,
        valid,
        begun.valid,
        _sets(begun.train, begun.valid),
    )


def check_ids(loaded: Pretrained, examples: Sequence[Any]) -> None:
    """Raise DataError for records with ids that the model has no embedding for: its tokenizer is another model's."""
    config: Any = getattr(loaded.model, "config", None)
    sizes = {"input_ids": vocabulary_size(loaded.model), "token_type_ids": getattr(config, "type_vocab_size", None)}
    problems = []
    for example in examples if hasattr(loaded.tokenizer, "get_vocab") else ():
        for name, size in sizes.items():
            ids = example.inputs.get(name, ()) if isinstance(example, Item) else getattr(example, name, ())
            if size and max(ids, default=0) >= size:
                problems.append(f"{example.place}: its {name} go up to {max(ids)}, the model has embeddings for {size}")
    if problems:
        raise DataError(
            f"{len(problems)} records do not fit {loaded.name}:", problems, "Is the tokenizer that of another model?"
        )


def held_out(model: str, data: str, config: TrainConfig, most: int) -> HeldOut:
    """The model, and the records that a run of these settings does not train on: exactly those that it cut from its training
    records, or at most so many of others. Raises as `prepare` does, and DataError where it holds out none."""
    if config.valid is not None or held_out_split(data):
        config = replace(config, valid_most=most)
    begun = _begin(model, data, config, 0, None)
    if begun.valid is None:
        raise DataError(f"The run held out none of the records of {data}: give others with --records.")
    return HeldOut(begun.loaded, begun.config, begun.valid, _sets(begun.train, begun.valid))


def trained_on(settings: Mapping[str, Any]) -> Records | None:
    """The records that a run of these settings, config.yaml's, trained on; None where they are not files that are there now."""
    data = settings.get("data")
    try:
        if not isinstance(data, str) or data.startswith("<") or local(data) is None:
            return None
        known = {key: settings[key] for key in keys(TrainConfig) if key in settings}
        config = from_mapping(TrainConfig, known, where="config.yaml")
        records = read(data, config.data, split=config.data.split)
        return _split(records, _held_out(data, records, config), config)[0]
    except DeltaWError as error:
        log.debug("What the adapter was trained on cannot be read: %s", error)
        return None


def _sets(train: Records, valid: Records | None) -> Sets:
    if valid is None:
        return Sets(described(train.items), None, None)
    return Sets(described(train.items), described(valid.items), overlap(valid.items, train.items))


class _Begun(NamedTuple):
    loaded: Pretrained
    config: TrainConfig
    train: Any
    valid: Any


def _begin(model: Any, data: Any, config: TrainConfig, positions: int, tokenizer: Any) -> _Begun:
    """The model, and the records that a run trains on and holds out. `positions`: that the method takes for itself."""
    records = read(data, config.data, split=config.data.split)
    valid = _held_out(data, records, config)
    config = replace(config, data=recognised(config.data, records, _config_of(model)))
    with seeded(config.seed):  # a head that the checkpoint does not have is drawn
        loaded = _loaded(model, tokenizer, config)
    config = _resolved(config, records.form, loaded, positions)
    return _Begun(loaded, config, *_split(records, valid, config))


def _config_of(model: Any) -> Any:
    """transformers' config of a model by its name, or of an object (None where that has none)."""
    return read_config(str(model)) if isinstance(model, (str, Path)) else getattr(model, "config", None)


def with_head(method: Any, head: Sequence[str]) -> Any:
    """The method with these modules trained whole beside it."""
    if not head or not hasattr(method, "whole"):
        return method
    given = [w.strip() for w in method.whole.split(",")] if isinstance(method.whole, str) else method.whole
    return replace(method, whole=",".join(dict.fromkeys([*filter(None, given), *head])))


def _loaded(model: Any, tokenizer: Any, config: TrainConfig) -> Pretrained:
    task, labels = config.data.task, config.data.labels
    if isinstance(model, (str, Path)):
        loaded = opened(str(model), config.data, dtype=config.dtype, device=config.device, to_train=True)
        if task != "image":
            check_vocabulary(loaded.model, loaded.tokenizer, loaded.name)
        return loaded
    if tokenizer is None:
        raise ConfigError("A model object needs its tokenizer: train(model, data, config, tokenizer=…).")
    if "default" in summary.adapters(model):
        raise AdapterError("The model has an adapter 'default' already: detach it first.")
    outputs = getattr(model.config, "num_labels", None)
    if labels is not None and outputs != len(labels):
        few = ", ".join(labels[:5]) + (" …" if len(labels) > 5 else "")
        raise ConfigError(
            f"The records have {len(labels)} classes ({few}), and the model's head has {outputs} outputs: open it with "
            f"num_labels={len(labels)}."
        )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if task != "image":
        check_vocabulary(model, tokenizer, name)
    if task in ("classification", "regression"):
        settle_padding(model, tokenizer, pad_id(tokenizer), name, scored=True, own=False)
    return Pretrained(model, tokenizer, name, head_of(model) if task in HEADED else (), given=True)


def _resolved(config: TrainConfig, form: str, loaded: Pretrained, taken: int) -> TrainConfig:
    """The settings with what `auto` came to, so that config.yaml reproduces the run on another machine, and a prompt given
    to the adapter later is wrapped as the records were."""
    if config.batch_tokens is not None and config.data.task == "image":
        raise ConfigError("batch_tokens counts tokens, and images have none: set batch.")
    data = prepared(config.data, form, loaded, taken)
    dtype = str(loaded.model.dtype).removeprefix("torch.") if hasattr(loaded.model, "dtype") else config.dtype
    return replace(config, data=data, dtype=dtype)  # type: ignore[arg-type]


def _held_out(source: Any, records: Any, config: TrainConfig) -> Any:
    """The held-out records where there is a split or file for them, else None."""
    if config.valid is not None:
        if is_path(config.valid):
            return read(config.valid, config.data)
        return read(source, config.data, split=config.valid)
    split = held_out_split(source) if isinstance(source, (str, Path)) else None
    return read(source, config.data, split=split) if split else None


def _split(records: Records, valid: Records | None, config: TrainConfig) -> tuple[Records, Records | None]:
    """Seeded: a part held out where there was none, then at most max_records to train on and valid_most to evaluate on. Prompts
    are held out whole; those of records that were given are as they are."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(config.seed)).tolist()
    if valid is None and config.valid_share > 0 and len(records) >= _FEW:
        count = max(1, min(round(len(records) * config.valid_share), config.valid_most))
        held = hold_out(
            records.items, count, most=config.valid_most, seed=config.seed, source=records.source, instead=_INSTEAD
        )
        valid, out = records.only(held), set(held)
        order = [i for i in order if i not in out]
    elif valid is not None:
        valid = valid.only(sample(valid.items, config.valid_most, seed=config.seed))
    if config.data.max_records is not None:
        order = order[: config.data.max_records]
    return records.only(sorted(order)), valid
