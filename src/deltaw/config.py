"""Settings of a user: frozen dataclasses, the one source of flags, YAML keys, defaults, help and checks.

Knows no torch, no model, no file format. A method's settings (`LoRA(rank=…)`) are the dataclass in its file under methods/, made
like these. The text under a field is its help on the command line.

Checks and conversions are ours. pydantic's dataclasses were tried: they take True as 1 and "no" as False, refuse a path for text,
and their import takes as long as most of `deltaw --help`. msgspec stops at the first problem, and checks no constructor call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from deltaw.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Form = Literal["auto", "prompt", "chat", "instruction", "text", "labelled", "image"]
Task = Literal["auto", "causal", "classification", "regression", "seq2seq", "image"]
TooLong = Literal["truncate", "drop", "error"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal[
    "AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Adafactor", "Muon", "RMSprop", "SGD"
]
DType = Literal["auto", "float32", "bfloat16", "float16"]

T = TypeVar("T", bound="DataclassInstance")

ABOVE_ZERO = math.ulp(0.0)
"""As a lower limit: any number above zero."""
BELOW_ONE = math.nextafter(1.0, 0.0)
# What every generator of random numbers takes, also with a small number added to it
LARGEST_SEED = 2**63 - 1
"""As an upper limit: any number below one."""


@dataclass(frozen=True, kw_only=True)
class Trusting:
    """Settings of what opens a model that may bring code."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a tokenizer beside an adapter: it can do whatever you can do on this
    machine. Without it a model that needs such code is refused. A settings file or a run's folder cannot allow it."""


@dataclass(frozen=True)
class DataConfig:
    """Records, and the way that they become tokens.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> deltaw.DataConfig(form="chat", max_length=512).max_length
        512
        >>> deltaw.DataConfig(max_length=1)
        Traceback (most recent call last):
        deltaw.errors.ConfigError: These settings cannot be used:
          - max_length is 1; it must be at least 2
    """

    form: Form = "auto"
    """Form of the records: prompt (prompt/completion), chat (messages), instruction (instruction/input/output), text, labelled
    (text, text_pair and label) or image (image and label). auto: by their fields."""
    task: Task = "auto"
    """Task to learn: the next token (causal), a class or a number for texts, a completion by an encoder's decoder (seq2seq), or a
    class for an image. auto: by the records and the model."""
    labels: list[str] | None = None
    """Names of the classes, in the order of the head's outputs. Default: those of the training records, sorted, or of the model's
    head."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """Wrap prompts in the tokenizer's chat template (chat), or do not (plain). auto: chat if the tokenizer has a template, which
    its model was then made for; plain for texts, and where a separator is set."""
    separator: str | None = None
    """Text between prompt and completion when the template is plain. Default: a newline, or nothing where prompts end or
    completions begin with white space, or an instruction's frame ends the prompt."""
    system: str | None = None
    """System message for every conversation that has none (chat template only)."""
    turns: Literal["all", "last"] = "all"
    """Answers of a conversation that are taught: all of them, or the last alone. An answer is learnt in the context that the chat
    template renders for it. Where the template changes earlier turns, each answer becomes a record of its own."""
    max_length: int = 1024
    """Longest record in tokens, prompt and completion together. At least 2."""
    too_long: TooLong = "truncate"
    """Treatment of a longer record: truncate it, drop it, or stop with an error. A prompt is cut at its left; a text, and a
    completion of an encoder's decoder, at the end. The numbers are reported."""
    columns: str = ""
    """Fields of the records by what they are taken as: prompt=question,completion=reply.text. The name of a field inside
    others has dots: choices.0.text. ignore=score leaves a field out that would be refused."""
    encoding: str = "utf-8"
    """Encoding of JSON, CSV and text files, for example cp1252."""
    split: str | None = None
    """Split of a hub data set or a folder to train on. Default: train."""
    max_records: int | None = None
    """Train on a random sample of at most this many records. At least 1. Default: all."""

    def __post_init__(self) -> None:
        wrong = [] if not isinstance(self.encoding, str) or _is_encoding(self.encoding) else [self.encoding]
        problems = [f"encoding is {name!r}, which is no encoding of text{nearest(name, _ENCODINGS)}" for name in wrong]
        check(self, problems, max_length=(2, None), max_records=(1, None))


LATEST = "runs/latest"
"""The default folder of a run: a link to a dated one."""


@dataclass(frozen=True)
class TrainConfig(Trusting):
    """The settings of one training run.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> config = deltaw.TrainConfig(out="runs/mine", steps=200, lr=1e-3, data=deltaw.DataConfig(max_length=512))
        >>> config.batch, config.schedule
        (8, 'linear')
        >>> deltaw.TrainConfig(lr=-1, schedule="cosin")
        Traceback (most recent call last):
        deltaw.errors.ConfigError: These settings cannot be used:
          - lr is -1; it must be above 0
          - schedule is 'cosin'; it must be one of cosine, linear, constant (did you mean 'cosine'?)
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Records, and the way that they become tokens. The command line and YAML have its settings beside the others."""
    out: str = LATEST
    """Run folder: adapter, config.yaml, log.jsonl, report.html. With runs/latest it is a new one each time, runs/DATE-NUMBER,
    which runs/latest is then a link to."""
    overwrite: bool = False
    """Replace a run folder that is already there."""
    lr: float | None = None
    """Peak learning rate, above 0. Default: the method's usual one, LoRA 1.5e-3, and lower for a model wider than 576: LoRA
    3.2e-4 at a width of 4,096. LoRA over texts takes twice that in a run of fewer than 200 steps."""
    schedule: Schedule = "linear"
    """Learning rate after warm-up: cosine or linear to zero, or constant."""
    warmup: float = 0.05
    """Warm-up from 0 to the peak: a share of the run if below 1, else a number of steps."""
    epochs: float | None = None
    """Passes over the training records, above 0; parts of one too. Default: by the task and their number, more for
    few."""
    steps: int | None = None
    """Number of optimizer steps, at least 1; overrides --epochs."""
    minutes: float | None = None
    """Stop training after this many minutes, above 0. The schedule follows the clock, so the learning rate still ends at
    zero. Held-out records are scored less often if that takes long."""
    batch: int = 8
    """Records per optimizer step, at least 1."""
    batch_tokens: int | None = None
    """Tokens per optimizer step at most, padding included; replaces --batch."""
    share: Literal["auto", "group", "off"] = "auto"
    """Compute what records of a batch begin with alike once for all of them (auto), or once for each (off). The result is the
    same, to rounding. Dropout drops the same entries for all of them. group: auto, and records that begin alike meet in a batch,
    where they fill half of it at most; each record still comes once an epoch, at a random place."""
    shard: Literal["off", "full"] = "off"
    """Hold all of the frozen base in each of several processes (off), or a part of each block's weights, which are gathered
    while the block computes (full): less memory, more time. What records begin with is then computed for each."""
    micro_batch: int | None = None
    """Records per forward pass, at most --batch; gradients accumulate over the batch. Default: the whole batch."""
    clip: float = 1.0
    """Largest Euclidean norm of all gradients together; 0 turns clipping off."""
    optimizer: Optimizer = "AdamW"
    """Optimizer of torch.optim, with its defaults."""
    weight_decay: float = 0.0
    """Weight decay of A, B and other trained matrices, 0 or more. AdamW's is decoupled. Biases, norms and other vectors have
    none."""
    lr_ratio: float = 1.0
    """Learning rate of B over that of A, which is --lr; above 0. LoRA+ (Hayou et al. 2024, arXiv 2402.12354) takes 2 to 16. A
    head or a magnitude has --lr."""
    seed: int = 0
    """Seed of A, of dropout and of the order of records."""
    dtype: DType = "auto"
    """Precision of the base weights. auto: bfloat16 where the device is faster in it, else float32 on a CPU and the checkpoint's
    elsewhere. A and B are float32 always. A model object keeps its own."""
    frozen_dtype: Literal["full", "int8", "auto"] = "full"
    """Precision of the products with frozen weights while training: full is theirs. int8 rounds both factors to 8 bits, with a
    scale for each row, and keeps 8 columns as they are; it is slower where a processor has no such products. auto: int8 where it
    is measured to be faster. Scores, merges and what is saved are of the weights as they are."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1, mps. auto: a GPU if there is one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    valid: str | None = None
    """Held-out data: a file, or a split of DATA. Default: DATA's valid, validation, dev or test split, else a part of it."""
    valid_share: float | None = None
    """Share of the training records to hold out if there is no held-out data, at most 0.5; 0 for none. Default: 0.02, but 32
    records at least, or a tenth of fewer than 320."""
    valid_most: int = 256
    """Most held-out records in each evaluation."""
    eval_every: int | None = None
    """Steps between evaluations. Default: ten evaluations in a run."""
    patience: int | None = None
    """Stop early after this many evaluations without a better held-out loss, and keep the best adapter. At least 1. Default:
    never."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    start: str | None = None
    """Adapter folder whose values training begins with: of the same method, rank and targets, on the same base."""
    skip_bad_steps: int = 0
    """Steps that may be passed over because their loss or gradient is not finite; one more ends the run."""
    save_every: int | None = None
    """Steps from one saved state to the next, from which --resume goes on. Default: by time."""
    samples: int = 4
    """Held-out records to generate before and after training, for the report; 0 for none."""
    samples_during: int = 0
    """Samples to answer at each evaluation too, for the report. Each costs up to 32 generated tokens an evaluation."""
    track: str = "auto"
    """Trackers that hear of the run, with commas: tensorboard, wandb, mlflow, trackio …; or none. They are reached through
    accelerate. Default: tensorboard, where it is installed, into the run folder."""

    def __post_init__(self) -> None:
        # A batch of another type is what check complains of, so it limits nothing
        bounded = isinstance(self.batch, numbers.Real) and self.batch_tokens is None
        check(
            self, lr=(ABOVE_ZERO, None), warmup=(0.0, None), epochs=(ABOVE_ZERO, None), steps=(1, None),
            minutes=(ABOVE_ZERO, None), batch=(1, None), batch_tokens=(1, None),
            micro_batch=(1, self.batch if bounded else None), clip=(0.0, None),
            weight_decay=(0.0, None), lr_ratio=(ABOVE_ZERO, None),
            valid_share=(0.0, 0.5), valid_most=(1, None), eval_every=(1, None), patience=(1, None),
            log_every=(1, None), samples=(0, None), samples_during=(0, None), skip_bad_steps=(0, None), save_every=(1, None),
            seed=(-LARGEST_SEED, LARGEST_SEED),
        )  # fmt: skip

    @property
    def peak_lr(self) -> float:
        """The learning rate. Raises ConfigError where it is left to the method: preparing a run settles it."""
        if self.lr is None:
            raise ConfigError("lr is left to the method, and there is none here: set lr.")
        return self.lr


@dataclass(frozen=True)
class GenerateConfig:
    """Decoding of completions.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> deltaw.GenerateConfig().temperature  # greedy decoding
        0.0
        >>> sampling = deltaw.GenerateConfig(max_new_tokens=64, temperature=0.8, top_p=0.95, seed=1)
    """

    max_new_tokens: int = 256
    """Longest completion in tokens, at least 1."""
    temperature: float = 0.0
    """Temperature: 0 takes the likeliest token each time, above 0 samples. The base's generation_config gives only the tokens
    that begin and end a text, and none of its penalties or forbidden words."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with this much probability, above 0 and at most 1. (Holtzman et al.
    2020, arXiv 1904.09751, §3.1.)"""
    beams: int = 1
    """Beam search with this many beams, at least 1; 1 is none."""
    length_penalty: float = 1.0
    """Power of the length that a beam's score is divided by: above 1 favours longer completions."""
    batch: int = 16
    """Prompts decoded at once, at least 1."""
    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        check(
            self, max_new_tokens=(1, None), temperature=(0.0, None), top_p=(ABOVE_ZERO, 1.0), beams=(1, None),
            batch=(1, None), seed=(-LARGEST_SEED, LARGEST_SEED),
        )  # fmt: skip


@dataclass(frozen=True)
class CompareConfig:
    """Methods to compare. The training options set the budget of each run (steps, minutes, batch …), the same for all.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> deltaw.CompareConfig(methods="lora,lora(rank=64),bitfit", lrs=3, seeds=2).test_most
        500
    """

    methods: str = ""
    """Methods, with commas and their settings in brackets: lora(rank=64), bottleneck(size=16;kind=lin;lr=1e-3). Default: nine of
    them."""
    lrs: int = 1
    """Learning rates to try for each method, a factor of three apart around its usual one. The best one counts: by held-out
    loss, or by the last of the metrics for classes and numbers. At least 1."""
    seeds: int = 1
    """Number of seeds per method, at its best learning rate. At least 1."""
    metrics: str = ""
    """Scores on the test records, with commas; the last one ranks. Default: the loss, and the usual ones of classes or
    numbers."""
    test: str | None = None
    """Records to score at the end: a file, or a split of DATA. Default: DATA's test, valid or dev split, else a part of it."""
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
    """Ranks to try. The training options set the budget of each run (steps, minutes, batch …), the same for all.

    α is the first rank's for all, as in the paper (section 4.1), so that the learning rate need not follow the rank.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> deltaw.SweepConfig(ranks="8,1,2,4", lrs="1e-4,5e-4", seeds=3).margin
        0.01
    """

    ranks: str = "8,1,2,4,16,64"
    """Ranks to try, with commas; α is the first one, unless --alpha says otherwise."""
    lrs: str = ""
    """Learning rates to try for each rank, with commas; the best on held-out records counts. Default: --lr alone."""
    targets: str = ""
    """Layers to adapt, with a semicolon between choices to compare: qv;attention;all-linear. Default: all-linear."""
    budget: str | None = None
    """Trainable parameters for each choice of targets, instead of ranks: 0.5M or 300k, as nearly as whole ranks allow.
    --targets is then by default q;v;q,v;q,k,v,o;mlp;all-linear."""
    seeds: int = 1
    """Number of seeds per rank, at its best learning rate. At least 1."""
    method: Literal["lora", "dora"] = "lora"
    """Method to train."""
    alpha: float | None = None
    """α of every rank. Default: the first of --ranks."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """Factor of BA: the paper's α/r (§4.1), or rank-stabilised α/√r. (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.)"""
    init: Literal["gaussian", "kaiming", "pissa"] = "gaussian"
    """Start of A, as in training."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the branch's input in training. From 0 to below 1."""
    abreast: int | None = None
    """Candidates that share one pass over the base. Default: on a GPU as many as its memory holds, on a CPU one."""
    halving: bool = False
    """End the worse half of the candidates, by held-out loss, after a quarter of the steps and again after a half."""
    margin: float = 0.01
    """Share by which a recommended rank's loss may exceed the largest rank's, 0 or more; of classes the share of the
    records that it may answer wrong beside it. Differences of 0.005 nats are always allowed, unless it is 0."""
    metrics: str = ""
    """Scores on the test records, with commas. Default: the loss, and the usual ones of classes or numbers."""
    test: str | None = None
    """Records to score at the end: a file, or a split of DATA. Default: DATA's test, valid or dev split, else a part of it."""
    test_most: int = 500
    """Most test records to score."""

    def __post_init__(self) -> None:
        check(
            self, seeds=(1, None), alpha=(ABOVE_ZERO, None), dropout=(0.0, BELOW_ONE), margin=(0.0, None),
            abreast=(1, None), test_most=(1, None),
        )  # fmt: skip


@dataclass(frozen=True)
class RankConfig(Trusting):
    """Ranks to cut a finished run's adapter to, and their scoring.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> deltaw.RankConfig(ranks="1,2,4", margin=0.02, confirm=True, seeds=3).most
        256
    """

    ranks: str = ""
    """Ranks to cut the adapter to, with commas. Default: 1, 2, 4, 8 … up to its rank."""
    margin: float = 0.01
    """Share by which a recommended rank's loss may exceed the whole adapter's, 0 or more; of classes the share of the
    records that it may answer wrong beside it. Differences of 0.005 nats are always allowed, unless it is 0."""
    records: str | None = None
    """Held-out records to score: a file, or a split of the run's data. Default: the records that the run held out."""
    most: int = 256
    """Most records to score."""
    metrics: str = ""
    """Scores beside the loss, with commas, as in eval. Default: the usual ones for classes and numbers."""
    against: str = ""
    """Other runs or adapters on the same base, with commas, of another rank or seed: how far their directions agree."""
    confirm: bool = False
    """Train at the recommended rank and at the adapter's, with the run's settings, and compare both on records that chose
    nothing."""
    seeds: int = 1
    """Number of seeds per rank, with --confirm."""
    model: str | None = None
    """Base model: hub id, model folder or GGUF file. Default: the run's."""
    data: str | None = None
    """Training data; --records may be a split of it. Default: the run's."""
    out: str | None = None
    """Folder for rank.json and rank.html. Default: the run's."""

    def __post_init__(self) -> None:
        check(self, margin=(0.0, None), most=(1, None), seeds=(1, None))


@dataclass(frozen=True)
class PlanConfig(Trusting):
    """Training to plan. Shapes alone decide: no weights are read, and nothing is trained.

    Raises:
        ConfigError: A value is of another type or out of range, with all such values.

    Example:
        >>> import deltaw
        >>> config = deltaw.PlanConfig(methods="lora,full", batch=4, length=64, device="cpu")
        >>> lora, full = deltaw.plan("model", config).rows
        >>> lora.memory.total < full.memory.total and lora.adapter_bytes < full.adapter_bytes
        True
    """

    methods: str = ""
    """Methods, with commas and their settings in brackets: lora(rank=64). Default: nine of them."""
    task: Task = "auto"
    """Task to learn. auto: by the model's head."""
    labels: int = 2
    """Number of classes in a classification."""
    batch: int = 8
    """Records per forward pass."""
    length: int | None = None
    """Tokens of the longest record, prompt and completion together. At least 2. Default: 512, or the model's positions."""
    dtype: DType = "auto"
    """Precision of the base weights. auto: bfloat16, or float32 on a CPU that is no faster in it. Trained values are
    float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: a GPU if there is one here. A GPU's kernels keep other tensors for the backward pass."""
    optimizer: Optimizer = "AdamW"
    """An optimizer of torch.optim, as in training."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    memory: str | None = None
    """Find the largest batch that trains within this much memory: 16GB, 40GiB."""

    def __post_init__(self) -> None:
        check(self, labels=(1, None), batch=(1, None), length=(2, None))


def check(config: DataclassInstance, problems: Sequence[str] = (), **limits: tuple[float | None, float | None]) -> None:
    """Raise one ConfigError with each field of a wrong type, not one of its literals, not finite, or outside its (low, high).

    `problems` are others of the same settings.

    Values of the right type in another guise (a Path for text, numpy's numbers) become plain.
    """
    problems = list(problems)
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        try:
            plain = _plain(value, hints[name])
        except ValueError:
            problems.append(_misfit(name, value, hints[name]))
            continue
        limit = limits.get(name, (None, None))
        if isinstance(plain, float) and not math.isfinite(plain):
            problems.append(f"{name} is {plain}; it must be a finite number")
        elif isinstance(plain, int | float) and not _within(plain, *limit):
            problems.append(f"{name} is {plain!r}; it must be {_range(*limit)}")
        elif plain is not value:
            object.__setattr__(config, name, plain)
    if problems:
        raise ConfigError("These settings cannot be used:", problems)


_ENCODINGS = ("utf-8", "utf-16", "cp1252", "latin-1", "cp1251", "cp932", "gb18030", "euc-kr", "shift-jis", "big5")


def _is_encoding(name: str) -> bool:
    """Return whether Python decodes bytes of this encoding to text."""
    try:
        bytes(4).decode(name)
    except UnicodeError:  # an encoding that these bytes are not of
        return True
    except (LookupError, ValueError):
        return False
    return True


def keys(cls: type[DataclassInstance]) -> list[str]:
    """Return every YAML key of `cls`; the keys of a dataclass in it are beside its own."""
    names = []
    for field in dataclasses.fields(cls):
        inner = _dataclass(_hints(cls)[field.name])
        names += keys(inner) if inner is not None else [field.name]
    return names


def to_mapping(config: DataclassInstance) -> dict[str, object]:
    """Return `config` as flat plain values, the inverse of `from_mapping`."""
    flat: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value: object = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat |= to_mapping(value)
        else:
            flat[field.name] = value
    return flat


def to_yaml(values: Mapping[str, object]) -> str:
    """Return plain values as YAML that reads back as exactly them."""
    import yaml

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML writes some line separators (U+0085) bare and reads them as others; escaped, they come back
    return text if yaml.safe_load(text) == values else yaml.safe_dump(values, sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, object]:
    """Return the settings in a YAML file. Raises ConfigError, which names the file."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader that refuses a key that stands twice: YAML forbids it, and PyYAML lets the last one win."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in counts.items() if count > 1 and key != "<<"]:
                raise ConfigError(f"{path} sets {', '.join(twice)} more than once: leave one.")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings, one `key: value` a line.")
    return values


def check_is(value: object, cls: type, name: str) -> None:
    """Raise ConfigError where an argument is not of its class. name: the argument's."""
    if not isinstance(value, cls):
        example = f"{cls.__name__}(**{name})" if isinstance(value, Mapping) else f"a {cls.__name__}"
        raise ConfigError(f"{name} is {value!r}, a {type(value).__name__}: give {example}.")


def from_mapping(
    cls: type[T],
    values: Mapping[str, object],
    *,
    where: str = "config",
    meaning: Callable[[str], str] = lambda key: "",
) -> T:
    """Return a `cls` from flat `values`.

    where: their source, for messages; "" for none. meaning: says what an unknown key may mean, as the
    end of a sentence; "" where it cannot.

    Raises one ConfigError with every unknown key (and its nearest), missing key, wrong type and value out of range.
    """
    known, prefix = keys(cls), f"{where}: " if where else ""
    problems = [
        f"{prefix}unknown key {k!r}{meaning(k) or nearest(k, known, cutoff=0.7)}" for k in values if k not in known
    ]
    config = _built(cls, values, prefix, problems)
    if problems or config is None:
        raise ConfigError("The configuration cannot be used:", problems)
    return config


def _built(cls: type[T], values: Mapping[str, object], prefix: str, problems: list[str]) -> T | None:
    """A `cls` from its part of the values; None, with the problems added, where they do not make one."""
    arguments: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        name, hint = field.name, _hints(cls)[field.name]
        inner = _dataclass(hint)
        if inner is not None:
            nested = _built(inner, values, prefix, problems)
            arguments |= {} if nested is None else {name: nested}
        elif name in values:
            try:
                arguments[name] = _plain(values[name], hint)
            except ValueError:
                problems.append(f"{prefix}{_misfit(name, values[name], hint)}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    try:
        return cls(**arguments)
    except ConfigError as error:
        problems += error.problems
    except TypeError:  # a required value misfits or is missing, which is among the problems
        pass
    return None


@functools.cache
def _hints(cls: type[DataclassInstance]) -> dict[str, object]:
    """Field → its type. Cached: every new config asks, and finding out is slow."""
    return typing.get_type_hints(cls)


def _dataclass(hint: object) -> type[DataclassInstance] | None:
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _plain(value: object, hint: object) -> object:
    """`value` as of type `hint`: 8.0 as an int, '5e-4' as a float, a Path as text. Raises ValueError where it is of another."""
    kind = typing.get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            with contextlib.suppress(ValueError):
                return _plain(value, option)
    elif kind is Literal:
        if value in typing.get_args(hint):
            return value
    elif kind is float and isinstance(value, str):  # YAML 1.1 reads 5e-4 as text
        return float(value)
    elif kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return value if isinstance(value, int) else float(value)
    elif kind is int and isinstance(value, bool):
        pass
    elif kind is int and (isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())):
        return int(value)
    elif kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError


def _misfit(name: str, value: object, hint: object) -> str:
    """The problem with a value of another type than `hint`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words, choices = [], list[str]()
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is Literal:
            choices += map(str, typing.get_args(option))
            words.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        else:
            words.append(_WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}"))
    near = nearest(value, choices) if isinstance(value, str) else ""
    return f"{name} is {value!r}; it must be {' or '.join(words)}{near}"


_WORDS: dict[object, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", list: "a list",
    Sequence: "a list", Mapping: "a mapping of names to numbers",
}  # fmt: skip


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _range(low: float | None, high: float | None) -> str:
    words = [] if low is None else ["above 0" if low == ABOVE_ZERO else f"at least {low}"]
    words += [] if high is None else ["below 1" if high == BELOW_ONE else f"at most {high}"]
    return " and ".join(words)
