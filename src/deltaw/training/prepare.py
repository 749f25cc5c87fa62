"""A run before its first step: the model, encoded records, held-out records, settings with `auto` resolved. Trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import nn

from deltaw.config import TrainConfig, from_mapping, keys
from deltaw.data import Encoded, Example, Records, held_out_split, read
from deltaw.data.hold_out import hold_out, sample
from deltaw.data.items import Item
from deltaw.data.labels import only_in_one
from deltaw.data.prompts import described, overlap
from deltaw.data.records import notes_of
from deltaw.data.sources import Source, is_path, local
from deltaw.errors import AdapterError, ConfigError, DataError, DeltaWError, shown, visible
from deltaw.layers.ops.seeding import seeded
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Method
from deltaw.methods.registry import at_width, usual_lr
from deltaw.model import summary
from deltaw.model.inputs import hidden_size_of, settle_padding, vocabulary_size
from deltaw.model.pretrained import HEADED, Pretrained, check_vocabulary, head_of, pad_id, read_config
from deltaw.progress import say
from deltaw.training.frozen import is_faster
from deltaw.training.opening import opened, prepared
from deltaw.training.tasks import recognised, task_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "str | Path | nn.Module"
"""A model's name, folder or GGUF file, or a loaded model."""
Tokenizer: TypeAlias = "PreTrainedTokenizerBase | BaseImageProcessor"
log = logging.getLogger("deltaw")
# Fewer records are all trained on
_FEW = 20
# Held out by default: this share, but so many records at least, or a tenth of few
_SHARE, _LEAST, _OF_FEW = 0.02, 32, 0.1
# Characters of the first record's prompt and answer that are shown
_SHOWN = 80
_INSTEAD = "Give held-out records with --valid, or hold out none with --valid-share 0."


@dataclass(frozen=True)
class Prepared:
    """A run before its first step."""

    loaded: Pretrained
    source: Source
    """The data as the user named it."""
    config: TrainConfig
    """With `auto` resolved."""
    method: Any
    """A method's config, with the head that the model lacked."""
    encoded: Encoded
    valid: Encoded | None
    valid_records: Records | None
    sets: Sets


@dataclass(frozen=True)
class Sets:
    """The sets of records, for people to read."""

    train: str
    """For example "300 records of 47 prompts"."""
    valid: str | None
    """None where nothing is held out."""
    overlap: str | None
    """A warning where prompts are on both sides, or a class has records on one alone."""
    notes: Sequence[str] = ()
    """Sentences on how the records were read, and on the fields that are not used."""


@dataclass(frozen=True)
class HeldOut:
    """Records that a run did not train on, and the model to score on them."""

    loaded: Pretrained
    config: TrainConfig
    """With `auto` resolved."""
    records: Records
    sets: Sets


def prepare(
    model: Model, data: Source, config: TrainConfig, method: Method, *, tokenizer: Tokenizer | None = None
) -> Prepared:
    """Open the model, read and encode the records, and resolve `auto` in the settings.

    Raises ConfigError, FileError or DataError, each with everything wrong of its kind.
    """
    return encoded(begin(model, data, config, method.positions, tokenizer), data, method)


def encoded(begun: Begun, data: Source, method: Method) -> Prepared:
    """Return what was begun with its records encoded. Raises DataError with all that cannot be."""
    loaded, config = begun.loaded, _settled(begun, method)
    task = task_of(config.data)
    say("encoding the records")
    train = task.encode(begun.train, loaded, config.data)
    valid = task.encode(begun.valid, loaded, config.data) if begun.valid is not None else None
    check_ids(loaded, [*train.examples, *(valid.examples if valid is not None else ())])
    return Prepared(
        loaded,
        data,
        config,
        with_head(method, loaded.head),
        train,
        valid,
        begun.valid,
        replace(_sets(begun), notes=(*begun.notes, *_first_record(begun, train))),
    )


def _first_record(begun: Begun, train: Encoded) -> Iterator[str]:
    """Yield a sentence on how prompts are put, with the first record: the end of its prompt, and the start of what is taught."""
    example, data = train.examples[0], begun.config.data
    if not isinstance(example, Example) or begun.train.form == "text" or not any(example.supervised):
        return
    tokenizer, at = cast("PreTrainedTokenizerBase", begun.loaded.tokenizer), example.supervised.index(True)
    parts = (example.input_ids[:at], example.input_ids[at:])
    before, taught = (visible(str(tokenizer.decode(ids)).replace("\n", "⏎")) for ids in parts)
    before = "…" * (len(before) > _SHOWN) + before[-_SHOWN:]
    taught = taught[:_SHOWN] + "…" * (len(taught) > _SHOWN)
    if data.template == "chat":
        how = "Prompts are put into the model's chat template"
        how += "" if begun.train.form == "chat" else " (--template plain leaves it out)"
    else:
        how = "Prompts are taken without a chat template"
    yield f"{how}. The first record: {before} → taught: {taught}"


def _settled(begun: Begun, method: Method) -> TrainConfig:
    """Return the settings with the learning rate and the passes that the method, the model and the records call for."""
    config, records = begun.config, len(begun.train)
    if config.epochs is None:
        config = replace(config, epochs=task_of(config.data).usual_epochs(records))
    if config.lr is None:
        width = hidden_size_of(getattr(begun.loaded.model, "config", None))
        # LoRA+ keeps the mean of both rates
        lr = at_width(usual_rate(method, width, config, records) / config.lr_ratio**0.5, None)
        config = replace(config, lr=lr)
    return config


# Runs of texts of fewer steps take so many times the usual rate of LoRA (results/defaults.json)
_SHORT, _FASTER = 200, 2.0


def usual_rate(method: Method, width: int | None, config: TrainConfig, records: int) -> float:
    """Return the usual learning rate of a run over so many records: the method's, and a higher one where few steps want it.

    That was measured of LoRA over texts. width: the model's hidden size.
    """
    lr = usual_lr(method, width)
    if not isinstance(method, LoRA) or task_of(config.data).answers != "text" or config.minutes or config.batch_tokens:
        return lr
    steps = config.steps or (config.epochs or 1.0) * records / config.batch
    return at_width(_FASTER * lr, None) if steps < _SHORT else lr


def check_ids(loaded: Pretrained, examples: Sequence[Example | Item]) -> None:
    """Raise DataError for records with ids that the model has no embedding for: its tokenizer is another model's."""
    config = getattr(loaded.model, "config", None)
    sizes = {"input_ids": vocabulary_size(loaded.model), "token_type_ids": getattr(config, "type_vocab_size", None)}
    problems = []
    for example in examples if hasattr(loaded.tokenizer, "get_vocab") else ():
        for name, size in sizes.items():
            ids = example.inputs.get(name) if isinstance(example, Item) else getattr(example, name, None)
            if size and isinstance(ids, list) and max(ids, default=0) >= size:
                problems.append(f"{example.place}: its {name} go up to {max(ids)}, the model has embeddings for {size}")
    if problems:
        raise DataError(
            f"{len(problems)} records do not fit {loaded.name}:", problems, "Is the tokenizer that of another model?"
        )


def held_out(model: str, data: str, config: TrainConfig, most: int) -> HeldOut:
    """Return the model and the records that a run of these settings does not train on.

    They are exactly the ones that it cut from its training records, or at most `most` of its separate held-out records.

    Raises as `prepare` does, and DataError where the run holds out none.
    """
    if config.valid is not None or held_out_split(data, config.data.split):
        config = replace(config, valid_most=most)
    begun = begin(model, data, config, 0, None)
    if begun.valid is None:
        raise DataError(f"The run held out none of the records of {data}: give others with --records.")
    return HeldOut(begun.loaded, begun.config, begun.valid, _sets(begun))


def trained_on(settings: Mapping[str, object]) -> Records | None:
    """Return the records that a run of these settings (config.yaml's) trained on; None where their files are not there now."""
    data = settings.get("data")
    try:
        if not isinstance(data, str) or data.startswith("<") or local(data) is None:
            return None
        known = {key: settings[key] for key in keys(TrainConfig) if key in settings}
        config = from_mapping(TrainConfig, known, where="config.yaml")
        records = read(data, config.data, split=config.data.split)
        return _split(records, held_out_records(data, config), config)[0]
    except DeltaWError as error:
        log.debug("The records that the adapter was trained on cannot be read: %s", error)
        return None


def _sets(begun: Begun) -> Sets:
    train, valid = begun.train, begun.valid
    if valid is None:
        return Sets(described(train.items), None, None, begun.notes)
    warnings = [overlap(valid.items, train.items)]
    if task_of(begun.config.data).answers == "class":
        warnings.append(only_in_one(valid.items, train.items))
    return Sets(described(train.items), described(valid.items), " ".join(filter(None, warnings)) or None, begun.notes)


class Begun(NamedTuple):
    """An opened model and the records for it, not encoded yet."""

    loaded: Pretrained
    config: TrainConfig
    """With `auto` resolved."""
    train: Records
    valid: Records | None
    """None where nothing is held out."""
    notes: tuple[str, ...]
    """On how the records were read."""


def begin(model: Model, data: Source, config: TrainConfig, positions: int, tokenizer: Tokenizer | None = None) -> Begun:
    """Open the model and read the records to train on and to hold out. `positions`: those that the method takes."""
    say("reading the records")
    records = read(data, config.data, split=config.data.split)
    valid = held_out_records(data, config)
    config = replace(config, data=recognised(config.data, records, _config_of(model, config.trust_remote_code)))
    with seeded(config.seed):  # a head that the checkpoint does not have is drawn
        loaded = _loaded(model, tokenizer, config)
    config = _resolved(config, records, loaded, positions)
    if valid is None and config.valid_share is None:
        config = replace(config, valid_share=_usual_share(len(records)))
    return Begun(loaded, config, *_split(records, valid, config), notes_of([records, valid]))


def _config_of(model: Model, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """Return transformers' config of a model by its name, or of an object; None where that has none."""
    config: PretrainedConfig | None = getattr(model, "config", None)
    if not isinstance(model, (str, Path)):
        return config
    return read_config(str(model), trust_remote_code=trust_remote_code)


def with_head(method: Any, head: Sequence[str]) -> Any:
    """Return the method with these modules trained whole beside it."""
    if not head or not hasattr(method, "whole"):
        return method
    whole = [w.strip() for w in method.whole.split(",")] if isinstance(method.whole, str) else method.whole
    return replace(method, whole=",".join(dict.fromkeys([*filter(None, whole), *head])))


def _loaded(model: Model, tokenizer: Tokenizer | None, config: TrainConfig) -> Pretrained:
    """Open a model by its name, or take a model object with its tokenizer."""
    task, labels = config.data.task, config.data.labels
    if isinstance(model, (str, Path)):
        loaded = opened(
            str(model),
            config.data,
            dtype=config.dtype,
            device=config.device,
            to_train=True,
            trust_remote_code=config.trust_remote_code,
        )
        if task != "image":
            check_vocabulary(loaded.model, loaded.tokenizer, loaded.name)
        return loaded
    if tokenizer is None:
        raise ConfigError("A model object needs its tokenizer: train(model, data, config, tokenizer=…).")
    if "default" in summary.adapters(model):
        raise AdapterError("The model has an adapter 'default' already: detach it first.")
    outputs = getattr(_config_of(model), "num_labels", None)
    if labels is not None and outputs != len(labels):
        few = shown(labels, 5)
        raise ConfigError(
            f"The records have {len(labels)} classes ({few}), and the model's head has {outputs} outputs: open it with "
            f"num_labels={len(labels)}."
        )
    name = getattr(_config_of(model), "_name_or_path", "") or type(model).__name__
    pretrained = cast("PreTrainedModel", model)  # or a module with the same interface, as torch.compile's
    if task != "image":
        check_vocabulary(model, tokenizer, name)
    if task in ("classification", "regression"):
        settle_padding(
            pretrained, cast("PreTrainedTokenizerBase", tokenizer), pad_id(tokenizer), name, scored=True, ours=False
        )
    return Pretrained(pretrained, tokenizer, name, head_of(pretrained) if task in HEADED else (), handed_over=True)


def _resolved(config: TrainConfig, records: Records, loaded: Pretrained, taken: int) -> TrainConfig:
    """Return the settings with `auto` resolved.

    So config.yaml reproduces the run on another machine, and a later prompt to the adapter is wrapped as the records were.
    """
    if config.batch_tokens is not None and config.data.task == "image":
        raise ConfigError("batch_tokens counts tokens, and images have none: set batch.")
    data = prepared(config.data, records, loaded, taken)
    if config.share == "group" and data.task != "causal":
        raise ConfigError(
            f"share: group is of texts that a causal model writes on, and this task is {data.task}; leave it out."
        )
    dtype = str(loaded.model.dtype).removeprefix("torch.") if hasattr(loaded.model, "dtype") else config.dtype
    frozen_dtype = config.frozen_dtype
    if frozen_dtype == "auto":
        frozen_dtype = "int8" if is_faster(next(loaded.model.parameters()).device.type) else "full"
    return replace(config, data=data, dtype=dtype, frozen_dtype=frozen_dtype)  # type: ignore[arg-type]


def held_out_records(source: Source, config: TrainConfig) -> Records | None:
    """Return the held-out records where there is a split or file for them, else None."""
    if config.valid is not None:
        if is_path(config.valid):
            return read(config.valid, config.data)
        return read(source, config.data, split=config.valid)
    split = held_out_split(source, config.data.split) if isinstance(source, (str, Path)) else None
    return read(source, config.data, split=split) if split else None


def _usual_share(records: int) -> float:
    """Return the share of so many records to hold out by default."""
    return max(round(records * _SHARE), min(_LEAST, round(records * _OF_FEW))) / records if records >= _FEW else 0.0


def _split(records: Records, valid: Records | None, config: TrainConfig) -> tuple[Records, Records | None]:
    """Hold out a part by the seed where none was; take at most max_records to train on and valid_most to evaluate on.

    Whole prompts are held out, so that none is on both sides; separate held-out records are taken as they are.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(config.seed)).tolist()
    share = _usual_share(len(records)) if config.valid_share is None else config.valid_share
    if valid is None and share > 0 and len(records) >= _FEW:
        count = max(1, min(round(len(records) * share), config.valid_most))
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
