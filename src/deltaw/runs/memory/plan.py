"""What training would take, from shapes alone: parameters, checkpoints, memory by part, FLOPs, the largest batch, for several
methods side by side. Reads a config and no weights; prints nothing.

Parameters are counted on the updates that a method really makes, memory on a training step that is really run, both on the meta
device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from deltaw.config import PlanConfig, Task, TrainConfig
from deltaw.data.batches import padded
from deltaw.data.encode import Example
from deltaw.data.items import Item
from deltaw.errors import ConfigError, FileError, TargetError, first_line, nearest
from deltaw.files.units import parse_size
from deltaw.methods.registry import DEFAULT, contestants
from deltaw.model.inputs import most_positions
from deltaw.model.pretrained import HEADED, Pretrained, bfloat16_pays, head_of, pick_device, read_config
from deltaw.runs.memory import machine
from deltaw.runs.memory.parts import Memory, Taken, counts, largest, memory_of, taken
from deltaw.runs.memory.presets import PRESETS
from deltaw.training.prepare import with_head
from deltaw.training.tasks import TASKS

_OPENERS: dict[str, Any] = {
    "causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification, "seq2seq": AutoModelForSeq2SeqLM, "image": AutoModelForImageClassification,
}  # fmt: skip
_LENGTH = 512
_IMAGE, _CHANNELS = 224, 3  # where the config does not say


@dataclass(frozen=True)
class PlannedMethod:
    """What one method would take."""

    name: str
    parameters: int
    """Trained ones."""
    share: float
    """Of the base's parameters."""
    adapter_bytes: int
    """Of its file, tensors alone."""
    bytes_with_optimizer: int
    """Of a checkpoint that training can go on from."""
    memory: Memory
    """With checkpointing if the settings have it."""
    kept: int
    """Bytes of activations without checkpointing."""
    kept_checkpointed: int | None
    """With it; None where the model has none."""
    flops_per_token: float | None
    """Forward and backward, the recomputation of checkpointing too; a multiplication and an addition are two. Counted over
    all products of the step, attention's among them. Of a model of images: for each image."""
    largest_batch: int | None
    """Rows of a forward pass that fit in the memory that was given; None where none was, 0 where not one fits."""
    note: str = ""
    coverage: tuple[str, ...] = ()
    """Which dense layers take an update, and which do not and why: a sentence each."""


@dataclass(frozen=True)
class Planned:
    """What `plan` returns."""

    model: str
    task: str
    dtype: str
    device: str
    length: int | None
    """Tokens of each row; None of images."""
    base_parameters: int
    base_bytes: int
    """Of a checkpoint of the whole model, in its precision."""
    rows: tuple[PlannedMethod, ...]
    failed: dict[str, str]
    """Methods that do not fit this model, and why."""


def plan(
    model: Any,
    config: PlanConfig = PlanConfig(),  # noqa: B008  (frozen)
    methods: Mapping[str, Any] | None = None,
) -> Planned:
    """What training `model` with each of `config.methods` would take, or with `methods`, by any names.

    model: a preset's name, a folder, a GGUF file or a hub id, of which the config is read and nothing else, or a transformers
    config. Raises ConfigError for settings that do not fit it, and FileError where there is no such model.
    """
    if methods is None:
        methods = {c.name: c.method for c in contestants(config.methods or DEFAULT)}
    room = None if config.memory is None else parse_size(config.memory, "memory")
    planner = _planner(model, config)
    rows, failed = [], {}
    for name, method in methods.items():
        try:
            rows.append(planner.row(name, method, room))
        except TargetError as error:
            failed[name] = str(error)
    return Planned(
        planner.name, planner.task, str(planner.dtype).removeprefix("torch."), planner.device, planner.length,
        planner.base_parameters, planner.base_bytes, tuple(rows), failed,
    )  # fmt: skip


# --- the model --------------------------------------------------------------------------------------------------


def _planner(model: Any, config: PlanConfig) -> _Planner:
    name = model if isinstance(model, str) else getattr(model, "_name_or_path", "") or type(model).__name__
    preset = PRESETS.get(model) if isinstance(model, str) and not Path(model).expanduser().exists() else None
    if preset is not None:
        settings, task = preset.config(), preset.task
    else:
        settings = _config_of(model) if isinstance(model, str) else copy.deepcopy(model)
        task = _usual_task(settings)
    task = task if config.task == "auto" else config.task
    if task in HEADED:
        settings.num_labels = 1 if task == "regression" else config.labels
    # What the forward passes of these ask for; a bare config may lack it
    for key in ("pad_token_id", "decoder_start_token_id") if task != "causal" else ():
        if getattr(settings, key, None) is None:
            setattr(settings, key, 0)
    device = pick_device("auto").type if config.device == "auto" else config.device
    return _Planner(name, settings, task, _dtype(config.dtype, device), device, config)


def _config_of(model: str) -> Any:
    try:
        return read_config(model)
    except FileError as error:
        raise FileError(
            f"{error}\nModels that need no network: {', '.join(PRESETS)}{nearest(model, PRESETS)}."
        ) from error


def _usual_task(settings: Any) -> Task:
    """By the head that the checkpoint has; of an encoder alone, which has none of its own, classes of texts or of images."""
    if getattr(settings, "is_encoder_decoder", False):
        return "seq2seq"
    names, kind = getattr(settings, "architectures", None), type(settings)
    if names:
        causal = names[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    else:
        causal = kind in AutoModelForCausalLM._model_mapping and kind not in AutoModelForMaskedLM._model_mapping
    if causal:
        return "causal"
    texts, images = (
        kind in opener._model_mapping
        for opener in (AutoModelForSequenceClassification, AutoModelForImageClassification)
    )
    return "image" if images and not texts else "classification"


def _dtype(dtype: str, device: str) -> torch.dtype:
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    if device == "cpu":
        return torch.bfloat16 if bfloat16_pays(torch.device("cpu")) else torch.float32
    return torch.bfloat16


@dataclass
class _Planner:
    """One model, and what its settings come to."""

    name: str
    settings: Any
    task: Task
    dtype: torch.dtype
    device: str
    config: PlanConfig

    def __post_init__(self) -> None:
        self.process = machine.held() if self.device == "cpu" else 0
        self.models = {False: self._built()}
        model = self.models[False]
        self.base_parameters = sum(p.numel() for p in model.parameters())
        self.base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        buffers = {b.untyped_storage()._cdata: b.untyped_storage().nbytes() for b in model.buffers()}
        self.weights = self.base_bytes + sum(buffers.values())
        self.length = None if self.task == "image" else self._length(most_positions(model))

    def _length(self, most: int | None) -> int:
        asked = self.config.length
        if asked is None:
            return _LENGTH if most is None else min(_LENGTH, most)
        if most is not None and asked > most:
            raise ConfigError(f"length is {asked}, and {self.name} has {most} positions.")
        return asked

    def _built(self) -> Any:
        if self.task not in _OPENERS:
            raise ConfigError(f"No plan can be made for task {self.task}; there are {', '.join(_OPENERS)}.")
        try:
            with torch.device("meta"):
                return _OPENERS[self.task].from_config(copy.deepcopy(self.settings), dtype=self.dtype).eval()
        except (ValueError, KeyError, ImportError) as error:
            raise FileError(f"{self.name} cannot be opened for task {self.task}: {first_line(error)}") from error

    def row(self, name: str, method: Any, room: int | None) -> PlannedMethod:
        """Raises TargetError where the method does not fit the model."""
        model = self.models[False]
        if self.task in HEADED:
            method = with_head(method, head_of(model))
        note = ""
        try:
            adapter = counts(model, method)
        except TargetError:
            if (instead := method.instead()) is None:
                raise
            method, note = instead
            adapter = counts(model, method)
        parameters, size = adapter.parameters, adapter.bytes
        rows = self.config.batch
        plain, again = (self._passes(method, rows, checkpointed=on) for on in (False, True))
        chosen = again if self.config.gradient_checkpointing else plain
        if plain is None or chosen is None:
            raise ConfigError(f"{self.name} has no checkpointing of activations.")
        return PlannedMethod(
            name=name, parameters=parameters, share=parameters / self.base_parameters, adapter_bytes=size,
            bytes_with_optimizer=size + chosen.step.optimizer, memory=self._memory(chosen, plain),
            kept=plain.step.activations, kept_checkpointed=None if again is None else again.step.activations,
            flops_per_token=None if chosen.estimated else chosen.step.flops / self._tokens(rows),
            largest_batch=None if room is None else self._largest(method, room), note=note,
            coverage=tuple(adapter.coverage.lines()),
        )  # fmt: skip

    def _memory(self, passes: Taken, plain: Taken) -> Memory:
        return memory_of(passes, self.process, self.weights, plain)

    def _largest(self, method: Any, room: int) -> int:
        @functools.cache
        def needed(rows: int) -> int:
            plain = self._passes(method, rows, checkpointed=False)
            again = self.config.gradient_checkpointing
            passes = self._passes(method, rows, checkpointed=True) if again else plain
            assert passes is not None and plain is not None
            return self._memory(passes, plain).total

        return largest(needed, room)

    def _tokens(self, rows: int) -> int:
        """With their padding; of images as many as there are."""
        return rows if self.length is None else rows * padded(self.length)

    def _passes(self, method: Any, rows: int, *, checkpointed: bool) -> Taken | None:
        """A step's bytes; None where the model has no checkpointing."""
        if checkpointed and not getattr(self.models[False], "supports_gradient_checkpointing", False):
            return None
        if checkpointed not in self.models:
            self.models[checkpointed] = self._built()
        model = self.models[checkpointed]
        config = TrainConfig(
            batch=rows, optimizer=self.config.optimizer, gradient_checkpointing=checkpointed, steps=1, valid_share=0.0
        )
        loaded = Pretrained(model, None, self.name)
        examples = [self._example()] * rows
        return taken(
            model, method, examples, config, self.device, lambda m: TASKS[self.task].loss(loaded), self._tokens(rows)
        )

    def _example(self) -> Any:
        """A record of the planned length, or an image of the model's size."""
        return _image(self.settings) if self.length is None else _text(self.task, self.length)


def _image(settings: Any) -> Item:
    size = getattr(settings, "image_size", None) or _IMAGE
    height, width = (size, size) if isinstance(size, int) else size
    return Item({"pixel_values": torch.zeros(getattr(settings, "num_channels", _CHANNELS), height, width)}, 0, "")


def _text(task: Task, length: int) -> Any:
    """So many tokens. All but the first are predicted, and of a completion all; class 0 of a text."""
    ids = [1] * length
    if task == "causal":
        return Example(ids, [False] + [True] * (length - 1), "")
    return Item({"input_ids": ids}, ids if task == "seq2seq" else 0, "")
