"""What a user can set: frozen dataclasses, the one source of flags, YAML keys, defaults, help and checks.

Knows no torch, no model, no file format. A method's own settings (`LoRA(rank=…)`) are the dataclass in its
file under methods/, of the same make. The text under a field is its help on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from deltaw.errors import ConfigError, nearest

Form = Literal["auto", "prompt", "chat", "instruction", "text", "labelled", "image"]
Task = Literal["auto", "causal", "classification", "regression", "seq2seq", "image"]
TooLong = Literal["truncate", "drop", "error"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal[
    "AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Adafactor", "Muon", "RMSprop", "SGD"
]
DType = Literal["auto", "float32", "bfloat16", "float16"]

T = TypeVar("T")

ABOVE_ZERO = math.ulp(0.0)
"""As a lower limit: any number above zero."""
BELOW_ONE = math.nextafter(1.0, 0.0)
"""As an upper limit: any number below one."""


@dataclass(frozen=True)
class DataConfig:
    """How records become tokens."""

    form: Form = "auto"
    """Form of the records: prompt (prompt/completion), chat (messages), instruction (instruction/input/output), text, labelled
    (text, text_pair and label) or image (image and label)."""
    task: Task = "auto"
    """What is learned: the next token (causal), a class or a number for a text or a pair of texts, a completion by a model with
    an encoder (seq2seq), or a class for an image. auto: by the records and the model."""
    labels: list[str] | None = None
    """Names of the classes, in the order of the head's outputs. Default: those in the training records, sorted, or the model's
    own where it has a head for them."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat wraps prompts in the tokenizer's chat template, plain does not. auto: chat for chat and instruction records
    where the tokenizer has a template."""
    separator: str = ""
    """Text put between prompt and completion when the template is plain, such as a newline."""
    system: str | None = None
    """System message put before every conversation that has none (chat template only)."""
    max_length: int = 1024
    """Longest record in tokens, prompt and completion together."""
    too_long: TooLong = "truncate"
    """A longer record: truncate the left of its prompt (the end of a text, and of a completion by an encoder's decoder), drop it,
    or stop with an error. What happened is counted and reported."""
    split: str | None = None
    """Split of a hub data set or a folder to train on; its default is train."""
    max_records: int | None = None
    """Use a seeded random sample of at most this many training records."""

    def __post_init__(self) -> None:
        check(self, max_length=(2, None), max_records=(1, None))


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    out: str = "runs/latest"
    """Run folder: adapter, config.yaml, log.jsonl, report.html."""
    overwrite: bool = False
    """Replace a run folder that is already there."""
    lr: float = 5e-4
    """Peak learning rate. LoRA wants about ten times full fine-tuning's."""
    schedule: Schedule = "linear"
    """Shape of the learning rate after warm-up: cosine or linear to zero, or constant."""
    warmup: float = 0.05
    """Warm-up: a share of the run when below 1, else a number of steps."""
    epochs: float = 1.0
    """Passes over the training records."""
    steps: int | None = None
    """Number of optimizer steps; overrides epochs."""
    minutes: float | None = None
    """Stop training after this many minutes at the latest; the schedule follows the clock, so that the learning rate
    still ends at zero. Held-out records that take long are scored less often."""
    batch: int = 8
    """Records per optimizer step."""
    batch_tokens: int | None = None
    """Tokens per optimizer step at most, padding included, instead of a number of records."""
    micro_batch: int | None = None
    """Records per forward pass; the optimizer step accumulates over the batch. Default: the whole batch at once."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    optimizer: Optimizer = "AdamW"
    """One of torch.optim's, with its defaults."""
    weight_decay: float = 0.0
    """Weight decay of A, B and other trained matrices; AdamW's is decoupled. Biases, norms and other vectors have none."""
    lr_ratio: float = 1.0
    """Learning rate of B over that of A, which is lr. LoRA+ takes 2 to 16. What is neither (a head, a magnitude) has lr."""
    seed: int = 0
    """Seed of A, of dropout and of the order of records."""
    dtype: DType = "auto"
    """Precision of the base weights in training: auto is bfloat16 where the device computes faster in it, else float32 on a
    CPU and the checkpoint's elsewhere. A and B stay float32. A model object keeps its own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    valid: str | None = None
    """Held-out data: a file, or a split of DATA. Default: the valid, validation, dev or test split, else a part of DATA."""
    valid_share: float = 0.02
    """Share of the training records held out when there is no held-out data; 0 for none."""
    valid_most: int = 256
    """Most held-out records used in each evaluation."""
    eval_every: int | None = None
    """Steps between evaluations; default: ten in a run."""
    patience: int | None = None
    """Stop early after this many evaluations without a better held-out loss, and keep the best adapter."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    samples: int = 4
    """Held-out records to generate before and after training, for the report; 0 for none."""

    def __post_init__(self) -> None:
        bounded = isinstance(self.batch, numbers.Real) and self.batch_tokens is None  # what batch is else, check says
        most = self.batch if bounded else None
        check(
            self, lr=(ABOVE_ZERO, None), warmup=(0.0, None), epochs=(ABOVE_ZERO, None), steps=(1, None),
            minutes=(ABOVE_ZERO, None), batch=(1, None), batch_tokens=(1, None), micro_batch=(1, most), clip=(0.0, None),
            weight_decay=(0.0, None), lr_ratio=(ABOVE_ZERO, None),
            valid_share=(0.0, 0.5), valid_most=(1, None), eval_every=(1, None), patience=(1, None),
            log_every=(1, None), samples=(0, None),
        )  # fmt: skip


@dataclass(frozen=True)
class GenerateConfig:
    """How completions are drawn."""

    max_new_tokens: int = 256
    """Longest completion in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time, exactly; above 0 samples. Of the base's generation_config only the tokens that
    begin and end a text count: its repetition penalty, forbidden words and the like do not."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this much probability."""
    beams: int = 1
    """Beam search with this many beams."""
    length_penalty: float = 1.0
    """Beam search: above 1 favours longer completions."""
    batch: int = 16
    """Prompts decoded at once."""
    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        check(
            self, max_new_tokens=(1, None), temperature=(0.0, None), top_p=(ABOVE_ZERO, 1.0), beams=(1, None),
            batch=(1, None),
        )  # fmt: skip


@dataclass(frozen=True)
class CompareConfig:
    """What is compared. The budget of each run (steps, minutes, batch …) is TrainConfig's, the same for all."""

    methods: str = ""
    """Methods, with commas, of those that the head of `deltaw compare --help` lists: full,lora,lin; with settings of their own
    in brackets: lora(rank=64), bottleneck(size=16;kind=lin;lr=1e-3). Default: nine of these."""
    lrs: int = 1
    """Learning rates to try for each method, a factor of three apart around its usual one; the best one counts: by held-out
    loss, of classes and numbers by the last of the metrics."""
    seeds: int = 1
    """Runs with the best learning rate, each with a seed of its own."""
    metrics: str = ""
    """Which scores on the test records, with commas; the last one ranks. Default: the loss, and for classes and numbers their
    usual ones."""
    test: str | None = None
    """Records to score at the end: a file, or a split of DATA. Default: its test split, else its valid or dev split, else a part
    of DATA."""
    test_most: int = 500
    """Most test records to score."""
    latency: bool = True
    """Time inference with each method beside the base at the end."""
    quick: bool = False
    """A first answer in about ten minutes on two cores: five methods, 45 seconds of training each, at most 64 test records."""

    def __post_init__(self) -> None:
        check(self, lrs=(1, None), seeds=(1, None), test_most=(1, None))


@dataclass(frozen=True)
class SweepConfig:
    """Which ranks are tried, and with what else. The budget of each run (steps, minutes, batch …) is TrainConfig's, the same for
    all; α is the first rank's for all, as in the paper, so that the learning rate need not follow the rank."""

    ranks: str = "8,1,2,4,16,64"
    """Ranks to try, with commas; α is the first one, unless --alpha says otherwise."""
    lrs: str = ""
    """Learning rates to try for each rank, with commas; the best on held-out records counts. Default: the run's --lr alone."""
    targets: str = ""
    """Which layers, as in training; several choices to compare with a semicolon between them: qv;attention;all-linear. Default:
    all-linear."""
    budget: str | None = None
    """Instead of ranks: so many trainable parameters for each choice of targets, 0.5M or 300k say, as nearly as whole ranks
    allow; --targets is then by default q;v;q,v;q,k,v,o;mlp;all-linear."""
    seeds: int = 1
    """Runs of each rank with its best learning rate, each with a seed of its own."""
    method: Literal["lora", "dora"] = "lora"
    """What is trained."""
    alpha: float | None = None
    """α of every rank. Default: the first of --ranks."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """The paper's α/r, or rank-stabilised α/√r (rsLoRA)."""
    init: Literal["gaussian", "kaiming", "pissa"] = "gaussian"
    """Start of A, as in training."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the branch's input in training."""
    abreast: int | None = None
    """Candidates in one pass over the base. Default: on a GPU as many as its memory holds; on a CPU, which is bound by
    arithmetic, one after the other."""
    halving: bool = False
    """End the worse half of the candidates, by their held-out loss, after a quarter of the steps, and again after a half."""
    margin: float = 0.01
    """How much worse than the largest rank's the loss of a recommended rank may be, as a share of it."""
    metrics: str = ""
    """Which scores on the test records, with commas. Default: the loss, and for classes and numbers their usual ones."""
    test: str | None = None
    """Records to score at the end: a file, or a split of DATA. Default: its test split, else its valid or dev split, else a part
    of DATA."""
    test_most: int = 500
    """Most test records to score."""

    def __post_init__(self) -> None:
        check(
            self, seeds=(1, None), alpha=(ABOVE_ZERO, None), dropout=(0.0, BELOW_ONE), margin=(0.0, None),
            abreast=(1, None), test_most=(1, None),
        )  # fmt: skip


@dataclass(frozen=True)
class RankConfig:
    """What a finished run is asked about its rank."""

    ranks: str = ""
    """Ranks to cut the adapter to, with commas. Default: 1, 2, 4, 8 … up to its own."""
    margin: float = 0.01
    """How much worse than the whole adapter's the loss of a recommended rank may be, as a share of it."""
    records: str | None = None
    """Held-out records to score: a file, or a split of the run's data. Default: those that the run itself held out."""
    most: int = 256
    """Most records to score."""
    metrics: str = ""
    """Which scores beside the loss, with commas, as eval takes them. Default: for classes and numbers their usual ones."""
    against: str = ""
    """Other runs or adapters on the same base, with commas, of another rank or seed: how far their directions are the same."""
    confirm: bool = False
    """Train at the recommended rank and at the adapter's own, as the run was, and compare on records that chose nothing."""
    seeds: int = 1
    """Of --confirm: runs of each rank."""
    model: str | None = None
    """Base model. Default: the one that the run names."""
    data: str | None = None
    """Training data, of which --records may be a split. Default: what the run names."""
    out: str | None = None
    """Folder of rank.json and rank.html. Default: the run's."""

    def __post_init__(self) -> None:
        check(self, margin=(0.0, None), most=(1, None), seeds=(1, None))


@dataclass(frozen=True)
class PlanConfig:
    """What is planned. Shapes alone decide: no weights are read, nothing is trained."""

    methods: str = ""
    """Methods, with commas, of those that the head of `deltaw plan --help` lists: full,lora,lin; with settings of their own in
    brackets: lora(rank=64). Default: nine of these."""
    task: Task = "auto"
    """What is learned: causal, classification, regression, seq2seq or image. auto: what the model's head is for."""
    labels: int = 2
    """Classes of a classification."""
    batch: int = 8
    """Records per forward pass."""
    length: int | None = None
    """Tokens of the longest record, prompt and completion together. Default: 512, or as many as the model has positions for."""
    dtype: DType = "auto"
    """Precision of the base weights: auto is bfloat16, but float32 on a CPU that is no faster in it. What is trained is
    float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What it is to be trained on; auto is the GPU if there is one here. A GPU keeps other things for the backward pass."""
    optimizer: Optimizer = "AdamW"
    """One of torch.optim's, as in training."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    memory: str | None = None
    """Find the largest batch that trains within this much: 16GB, 40GiB."""

    def __post_init__(self) -> None:
        check(self, labels=(1, None), batch=(1, None), length=(2, None))


def check(config: Any, **limits: tuple[float | None, float | None]) -> None:
    """Raise one ConfigError with every field of `config` that is of a wrong type, not one of its literals, not finite, or
    outside its [low, high]. What is of the right type in another guise (a Path for text, numpy's numbers) is made plain."""
    problems = []
    hints = _hints(typing.cast(Any, type(config)))
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        fits, value = _fit(given, hints[field.name])
        if not fits:
            near = nearest(given, map(str, _choices(hints[field.name]))) if isinstance(given, str) else ""
            problems.append(f"{field.name} is {given!r}; it must be {_spell(hints[field.name])}{near}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{field.name} is {value}; it must be a finite number")
        elif field.name in limits and value is not None and not _within(value, *limits[field.name]):
            problems.append(f"{field.name} is {value!r}; it must be {_bounds(*limits[field.name])}")
        elif value is not given:
            object.__setattr__(config, field.name, value)
    if problems:
        raise ConfigError(f"{type(config).__name__} cannot be used:", problems)


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _bounds(low: float | None, high: float | None) -> str:
    words = [] if low is None else ["above 0" if low == ABOVE_ZERO else f"at least {low}"]
    words += [] if high is None else ["below 1" if high == BELOW_ONE else f"at most {high}"]
    return " and ".join(words)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Field → its type; asked of every config that is made, and slow to find out."""
    return typing.get_type_hints(cls)


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def keys(cls: type) -> dict[str, tuple[type, ...]]:
    """Every YAML key of `cls`, nested dataclasses flattened: key → path of field names that leads to it."""
    hints = _hints(typing.cast(Any, cls))
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= {k: (field.name, *path) for k, path in keys(typing.cast(type, hint)).items()}
        else:
            found[field.name] = (field.name,)
    return found


def to_mapping(config: Any) -> dict[str, Any]:
    """`config` as flat plain values, the inverse of `from_mapping`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= to_mapping(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that reads back as exactly them."""
    import yaml

    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML writes some line separators (U+0085) bare and reads them as others; escaped, they come back
    return text if yaml.safe_load(text) == values else yaml.safe_dump(values, sort_keys=False)


def from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """A `cls` from flat `values`. Raises one ConfigError with every unknown key (and its nearest) and wrong type."""
    known = keys(cls)
    problems = [f"{where}: unknown key {k!r}{nearest(k, known)}" for k in values if k not in known]
    config = _build(cls, values, where, problems)
    if problems:
        raise ConfigError("The configuration cannot be used:", problems)
    return config


def _build(cls: type[T], values: Mapping[str, Any], where: str, problems: list[str]) -> T:
    hints = _hints(typing.cast(Any, cls))
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(typing.cast(type, hint), values, where, problems)
        elif field.name in values:
            value = values[field.name]
            fits, value = _fit(value, hint)
            if not fits:
                problems.append(f"{where}: {field.name} is {value!r}; it must be {_spell(hint)}")
            else:
                arguments[field.name] = value
    try:
        return cls(**arguments)
    except (ConfigError, TypeError) as error:
        problems += error.problems if isinstance(error, ConfigError) else [str(error)]
        return cls.__new__(cls)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value is of type `hint`, and the value as that type (8.0 as an int, '5e-4' as a float, a Path as text)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            fits, fitted = _fit(value, option)
            if fits:
                return True, fitted
        return False, value
    if hint is type(None):
        return value is None, value
    if origin is Literal:
        return value in typing.get_args(hint), value
    if origin in (dict, Mapping) or hint is dict:
        return isinstance(value, Mapping), value
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 5e-4 as a string
            try:
                return True, float(value)
            except ValueError:
                return False, value
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return fits, float(value) if fits and not isinstance(value, int) else value
    if hint is int:
        whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
        fits = whole and not isinstance(value, bool)
        return fits, int(value) if fits else value
    if hint is str and isinstance(value, os.PathLike):
        return True, os.fspath(value)
    if hint is Any:
        return True, value
    return isinstance(value, origin or hint), value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _spell(hint: Any) -> str:
    """A type as a user would say it."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = []
    for option in options:
        choices = _choices(option)
        name = getattr(typing.get_origin(option) or option, "__name__", str(option))
        words.append(f"one of {', '.join(map(str, choices))}" if choices else _WORDS.get(option, f"a {name}"))
    return " or ".join(words)
