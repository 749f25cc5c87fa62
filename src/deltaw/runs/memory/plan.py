"""The cost of training, from shapes alone, for several methods side by side. Reads a config and no weights; prints nothing.

It has parameters, checkpoint sizes, memory by part, FLOPs and the largest batch. Parameters are counted on the updates that a
method really makes, memory on a training step that is really run. Both are on the meta device, whose tensors have shapes and no
memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from deltaw.config import DType, PlanConfig, Task, TrainConfig
from deltaw.data.batches import padded
from deltaw.data.encode import Example
from deltaw.data.items import Item
from deltaw.errors import ConfigError, FileError, TargetError, first_line, nearest, needs_its_code
from deltaw.files.units import parse_size
from deltaw.methods.plan import Method
from deltaw.methods.registry import DEFAULT, contestants
from deltaw.model.inputs import most_positions
from deltaw.model.pretrained import HEADED, OPENERS, Pretrained, bfloat16_pays, head_of, pick_device, read_config
from deltaw.runs.memory import machine
from deltaw.runs.memory.parts import Memory, Taken, counts, largest, memory_of, taken
from deltaw.runs.memory.presets import PRESETS
from deltaw.runs.memory.step import Record
from deltaw.training.prepare import with_head
from deltaw.training.tasks import TASKS

_LENGTH = 512
_IMAGE, _CHANNELS = 224, 3  # of a config without them


@dataclass(frozen=True)
class PlannedMethod:
    """The cost of training with one method."""

    name: str
    parameters: int
    """Trained values."""
    share: float
    """The trained values over the base's parameters."""
    adapter_bytes: int
    """The tensors of an adapter file."""
    bytes_with_optimizer: int
    """A checkpoint from which training can be resumed."""
    memory: Memory
    """At the peak, with checkpointing if the settings have it."""
    kept: int
    """Bytes of activations without checkpointing."""
    kept_checkpointed: int | None
    """Bytes of activations with checkpointing; None where the model has none."""
    flops_per_token: float | None
    """All products of a step, recomputed ones included, over its tokens, or over its images. A multiplication and an addition
    are two. None where the memory is an estimate."""
    largest_batch: int | None
    """Rows of a forward pass that fit in the given memory, 0 where not one fits; None where none was given."""
    note: str = ""
    """A change to the method that made it fit the model; empty where it fits as it is."""
    coverage: tuple[str, ...] = ()
    """Sentences on the dense layers that take an update, and on those that do not and why."""


@dataclass(frozen=True)
class Planned:
    """The cost of training a model with each of several methods, as `plan` returns it.

    Example:
        >>> import deltaw
        >>> planned = deltaw.plan("model", deltaw.PlanConfig(methods="lora,full", length=64, device="cpu"))
        >>> planned.task, planned.base_parameters
        ('causal', 25504)
        >>> lora, full = planned.rows
        >>> full.memory.optimizer > lora.memory.optimizer
        True
    """

    model: str
    """Name, folder or id of the model, as it was asked for."""
    task: str
    """Task that is learned, such as causal."""
    dtype: str
    """Dtype of the base."""
    device: str
    """Device that is planned for."""
    length: int | None
    """Tokens of each row; None for images."""
    base_parameters: int
    """Numbers that the base holds."""
    base_bytes: int
    """A checkpoint of the whole model in its dtype."""
    rows: tuple[PlannedMethod, ...]
    """The methods that fit, in the order asked."""
    failed: dict[str, str]
    """Method that does not fit this model → why."""


def plan(
    model: str | PreTrainedConfig,
    config: PlanConfig = PlanConfig(),  # noqa: B008  (frozen)
    methods: Mapping[str, Method] | None = None,
) -> Planned:
    """Return what training `model` with each of several methods would take: parameters, memory, FLOPs. No weights are read.

    Args:
        model: A preset's name, a folder, a GGUF file, a hub id, or a transformers config.
        config: The settings of the plan, the methods by name among them.
        methods: Name → method, in place of `config.methods`. The names are yours.

    Raises:
        ConfigError: The settings do not fit the model, for example a length beyond its positions.
        FileError: There is no such model, or it cannot be opened for the task.

    Example:
        >>> import deltaw
        >>> config = deltaw.PlanConfig(batch=4, length=64, device="cpu", dtype="float32")
        >>> (row,) = deltaw.plan("model", config, {"mine": deltaw.LoRA(rank=2)}).rows
        >>> row.name, row.parameters, row.adapter_bytes
        ('mine', 1952, 7808)
    """
    if methods is None:
        methods = {c.name: c.method for c in contestants(config.methods or DEFAULT)}
    room = None if config.memory is None else parse_size(config.memory, "memory")
    subject = _subject(model, config)
    rows, failed = [], {}
    for name, method in methods.items():
        try:
            rows.append(_planned(subject, name, method, room))
        except TargetError as error:
            failed[name] = str(error)
    return Planned(
        subject.name, subject.task, str(subject.dtype).removeprefix("torch."), subject.device, subject.length,
        subject.base_parameters, subject.base_bytes, tuple(rows), failed,
    )  # fmt: skip


# --- the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """A model to plan for, on the meta device, and what its settings come to."""

    name: str
    task: Task
    device: str
    dtype: torch.dtype
    length: int | None
    """Tokens of each row; None of images."""
    process: int
    """Bytes of this process; 0 for a GPU."""
    asked: PlanConfig
    model: PreTrainedModel
    to_checkpoint: PreTrainedModel | None
    """The same model again, for steps with checkpointing, which they leave on; None where the model has none."""

    @property
    def base_parameters(self) -> int:
        """The parameters of the base."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def base_bytes(self) -> int:
        """The bytes of the base's parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def weights(self) -> int:
        """The bytes of the base in memory: its parameters and buffers."""
        buffers = {b.untyped_storage()._cdata: b.untyped_storage().nbytes() for b in self.model.buffers()}
        return self.base_bytes + sum(buffers.values())


def _subject(model: str | PreTrainedConfig, asked: PlanConfig) -> _Subject:
    name = model if isinstance(model, str) else getattr(model, "_name_or_path", "") or type(model).__name__
    preset = PRESETS.get(model) if isinstance(model, str) and not Path(model).expanduser().exists() else None
    if preset is not None:
        config, task = preset.config(), preset.task
    else:
        config = _config_of(model, asked.trust_remote_code) if isinstance(model, str) else copy.deepcopy(model)
        task = _usual_task(config)
    task = task if asked.task == "auto" else asked.task
    if task in HEADED:
        config.num_labels = 1 if task == "regression" else asked.labels
    # Forward passes of these tasks need both, which a bare config may lack
    for key in ("pad_token_id", "decoder_start_token_id") if task != "causal" else ():
        if getattr(config, key, None) is None:
            setattr(config, key, 0)
    device = pick_device("auto").type if asked.device == "auto" else asked.device
    dtype, process = _dtype(asked.dtype, device), machine.held() if device == "cpu" else 0
    bare = _built(config, task, dtype, name, asked.trust_remote_code)
    checkpoints = getattr(bare, "supports_gradient_checkpointing", False)
    return _Subject(
        name, task, device, dtype, None if task == "image" else _length(asked, name, most_positions(bare)), process, asked,
        bare, _built(config, task, dtype, name, asked.trust_remote_code) if checkpoints else None,
    )  # fmt: skip


def _config_of(model: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = read_config(model, trust_remote_code=trust_remote_code)
        return config
    except FileError as error:
        raise FileError(
            f"{error}\nModels that need no network: {', '.join(PRESETS)}{nearest(model, PRESETS)}."
        ) from error


def _usual_task(config: PreTrainedConfig) -> Task:
    """The task of the checkpoint's head. An encoder alone has no such head: it gets classes, of texts or of images."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    kind = type(config)
    if config.architectures:
        causal = config.architectures[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    else:
        causal = kind in AutoModelForCausalLM._model_mapping and kind not in AutoModelForMaskedLM._model_mapping
    if causal:
        return "causal"
    texts, images = (kind in OPENERS[task][0]._model_mapping for task in ("classification", "image"))
    return "image" if images and not texts else "classification"


def _dtype(dtype: DType, device: str) -> torch.dtype:
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device == "cpu" and not bfloat16_pays(torch.device("cpu")):
        return torch.float32
    return torch.bfloat16


def _length(asked: PlanConfig, name: str, positions: int | None) -> int:
    """The tokens of each row: as asked, or 512 where the model has so many positions."""
    if asked.length is None:
        return _LENGTH if positions is None else min(_LENGTH, positions)
    if positions is not None and asked.length > positions:
        raise ConfigError(f"length is {asked.length}, and {name} has {positions} positions.")
    return asked.length


def _built(
    config: PreTrainedConfig, task: Task, dtype: torch.dtype, name: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model on the meta device."""
    if task not in OPENERS:
        raise ConfigError(f"No plan can be made for task {task}; there are {', '.join(OPENERS)}.")
    opener, _ = OPENERS[task]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = opener.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
            return model
    except (ValueError, KeyError, ImportError) as error:
        raise needs_its_code(name, error) or FileError(
            f"{name} cannot be opened for task {task}: {first_line(error)}"
        ) from error


# --- a method ---------------------------------------------------------------------------------------------------


def _planned(subject: _Subject, name: str, method: Method, room: int | None) -> PlannedMethod:
    """The row of one method. Raises TargetError where it does not fit the model."""
    if subject.task in HEADED:
        method = with_head(method, head_of(subject.model))
    note = ""
    try:
        adapter = counts(subject.model, method)
    except TargetError:
        if (instead := method.instead()) is None:
            raise
        method, note = instead
        adapter = counts(subject.model, method)
    rows = subject.asked.batch
    plain, checkpointed = _plain(subject, method, rows), _checkpointed(subject, method, rows)
    chosen = checkpointed if subject.asked.gradient_checkpointing else plain
    if chosen is None:
        raise ConfigError(f"{subject.name} has no checkpointing of activations.")
    return PlannedMethod(
        name=name, parameters=adapter.parameters, share=adapter.parameters / subject.base_parameters,
        adapter_bytes=adapter.bytes, bytes_with_optimizer=adapter.bytes + chosen.step.optimizer,
        memory=memory_of(chosen, subject.process, subject.weights, plain),
        kept=plain.step.activations, kept_checkpointed=None if checkpointed is None else checkpointed.step.activations,
        flops_per_token=None if chosen.estimated else chosen.step.flops / _tokens(subject, rows),
        largest_batch=None if room is None else largest(lambda rows: _total(subject, method, rows), room), note=note,
        coverage=tuple(adapter.coverage.lines()),
    )  # fmt: skip


def _total(subject: _Subject, method: Method, rows: int) -> int:
    """The bytes at the peak with so many rows in a forward pass."""
    plain = _plain(subject, method, rows)
    passes = _checkpointed(subject, method, rows) if subject.asked.gradient_checkpointing else plain
    return memory_of(passes or plain, subject.process, subject.weights, plain).total


def _plain(subject: _Subject, method: Method, rows: int) -> Taken:
    return _taken(subject, subject.model, method, TrainConfig(batch=rows, optimizer=subject.asked.optimizer))


def _checkpointed(subject: _Subject, method: Method, rows: int) -> Taken | None:
    """A step that recomputes activations; None where the model cannot."""
    if subject.to_checkpoint is None:
        return None
    config = TrainConfig(batch=rows, optimizer=subject.asked.optimizer, gradient_checkpointing=True)
    return _taken(subject, subject.to_checkpoint, method, config)


def _taken(subject: _Subject, model: PreTrainedModel, method: Method, config: TrainConfig) -> Taken:
    """A step of these settings, with nothing held out, over as many equal records as its batch."""
    config = dataclasses.replace(config, steps=1, valid_share=0.0)
    loaded, examples = Pretrained(model, None, subject.name), [_example(subject)] * config.batch
    tokens = _tokens(subject, config.batch)
    return taken(model, method, examples, config, subject.device, lambda: TASKS[subject.task].loss(loaded), tokens)


def _tokens(subject: _Subject, rows: int) -> int:
    """The tokens of so many rows with their padding; the images where rows are images."""
    return rows if subject.length is None else rows * padded(subject.length)


def _example(subject: _Subject) -> Record:
    """An image of the model's size, or a text of the planned length.

    All tokens but a causal text's first are predicted, all of a completion, and class 0 of a labelled text.
    """
    config, length = subject.model.config, subject.length
    if length is None:
        size = getattr(config, "image_size", None) or _IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(getattr(config, "num_channels", _CHANNELS), height, width)
        return Item({"pixel_values": pixels}, 0, "")
    ids = [1] * length
    if subject.task == "causal":
        return Example(ids, [False] + [True] * (length - 1), "")
    return Item({"input_ids": ids}, ids if subject.task == "seq2seq" else 0, "")
