"""The commands as frozen dataclasses: arguments, flags and YAML keys, from the settings in config.py. Imports no torch."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from deltaw.config import (
    CompareConfig,
    DataConfig,
    DType,
    GenerateConfig,
    PlanConfig,
    RankConfig,
    SweepConfig,
    TrainConfig,
    keys,
)
from deltaw.errors import ConfigError, nearest
from deltaw.methods.lora import LoRA
from deltaw.methods.registry import METHODS, PRESETS, method_class

Model = Annotated[Positional[str], arg(metavar="MODEL")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
Adapter = Annotated[Positional[str], arg(metavar="ADAPTER")]


@dataclass(frozen=True)
class Train:
    """Train a low-rank update of MODEL on DATA; writes a run folder with the adapter and a report."""

    model: Model
    """Hub id, model folder or GGUF file."""
    data: Data
    """JSONL, JSON, CSV or parquet file, a folder with splits, or a hub data set."""
    config: str | None = None
    """YAML file of any of these settings, MODEL and DATA too; flags beside it win. A run's config.yaml is one."""
    method: MethodName = "lora"
    """What is trained. Each method has settings of its own: --method prefix --help shows those of prefix."""
    settings: LoRA = field(default_factory=LoRA)
    run: TrainConfig = field(default_factory=TrainConfig)


@functools.cache
def train_with(method: str) -> type[Train]:
    """The train command with this method's settings. Raises ConfigError for a method that there is not."""
    cls = method_class(method)
    if cls is LoRA:
        return Train
    members = {
        "__annotations__": {"settings": cls, "method": Literal.__getitem__(tuple(METHODS))},
        "settings": field(default_factory=cls),
        "method": method,
        "__module__": __name__,
        "__doc__": Train.__doc__,
    }
    return dataclass(frozen=True)(type("Train", (Train,), members))


@dataclass(frozen=True)
class Compare:
    """Compare methods on MODEL and DATA: quality, parameters, bytes, memory, time and latency of each, for the same budget. Goes
    on where a comparison of the same settings stopped."""

    model: Model
    """Hub id or model folder."""
    data: Data
    """Records as train reads them."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out="runs/compare"))


@dataclass(frozen=True)
class Sweep:
    """Try ranks on MODEL and DATA, over one base in memory: quality, parameters and bytes of each, and the smallest rank that is
    enough, with 95% intervals. Goes on where a sweep of the same settings stopped."""

    model: Model
    """Hub id, model folder or GGUF file."""
    data: Data
    """Records as train reads them."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out="runs/sweep"))
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Rank:
    """Say which rank a finished run needed: its adapter cut to each smaller rank, scored on held-out records, and the smallest
    rank that is enough, with 95% intervals."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder, or adapter folder."""
    rank: RankConfig = field(default_factory=RankConfig)
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Opening:
    """How MODEL is opened."""

    adapter: str | None = None
    """Adapter folder. Prompts are then wrapped as they were in its training, unless --template says otherwise."""
    any_base: bool = False
    """Load the adapter although it was trained on other base weights."""
    dtype: DType = "auto"
    """Precision of the weights."""
    device: str = "auto"
    """auto, cpu, cuda, mps …"""


@dataclass(frozen=True)
class Generate:
    """Complete one prompt, a file of prompts, or standard input, with or without an adapter."""

    model: Model
    """Hub id, model folder or GGUF file."""
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None
    """The prompt. Without it and without --file, standard input is read, a prompt a line."""
    file: str | None = None
    """File of prompts: records in any form that train reads, or plain text with a prompt a line."""
    out: str | None = None
    """Write {prompt, completion} records to this JSONL file instead of the screen."""
    opening: Opening = field(default_factory=Opening)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Chat:
    """Talk to MODEL in the terminal, with or without an adapter; /base and /adapter switch during the conversation."""

    model: Model
    """Hub id, model folder or GGUF file."""
    opening: Opening = field(default_factory=Opening)
    system: str | None = None
    """System message."""
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Eval:
    """Score MODEL on DATA, base and (with --adapter) adapter side by side, with bootstrap 95% intervals."""

    model: Model
    """Hub id, model folder or GGUF file."""
    data: Data
    """Records with references, as train reads them. Equal prompts are one item with several references."""
    opening: Opening = field(default_factory=Opening)
    base: bool = True
    """Score the base as well."""
    metrics: str | None = None
    """Which scores, with commas: loss, perplexity, exact_match, bleu, rouge_l; of classes loss, accuracy, f1, matthews; of
    quantities loss, pearson, spearman. Default: all; of text records, which have no prompt, loss and perplexity."""
    most: int | None = None
    """Score at most this many records, the first ones, prompts with all their records."""
    out: str | None = None
    """Write scores and predictions to this JSON file."""
    records: DataConfig = field(default_factory=DataConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Merge:
    """Fold ADAPTER into MODEL: an ordinary model folder that needs no deltaw. A checkpoint in safetensors is merged on disk,
    one tensor at a time, so any size will do."""

    model: Model
    """Hub id, model folder or GGUF file: the adapter's base."""
    adapter: Adapter
    """Adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    any_base: bool = False
    """Merge although the adapter was trained on other base weights."""
    reversible: bool = False
    """Write a correction file as well, a few percent of the model, with which unmerge gives the base's own bytes back."""
    untie: bool = False
    """Give layers that share a weight (embedding and head) one each, where the adapter changes it for one of them alone."""
    check: Literal["auto", "on", "off"] = "auto"
    """Load the merged model and compare its logits with the unmerged one's; auto: models of up to 2 GB."""
    dtype: DType = "auto"
    """Precision of the merged weights: auto keeps the checkpoint's; another one is merged in memory."""
    all_layers: bool = False
    """Also show the report's line of every layer."""


@dataclass(frozen=True)
class Unmerge:
    """Take ADAPTER out of the model folder MERGED again: after a reversible merge the base's own bytes, checked by their hash;
    else as near as subtracting comes."""

    merged: Annotated[Positional[str], arg(metavar="MERGED")]
    """Folder that merge wrote."""
    adapter: Adapter
    """Adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    overwrite: bool = False
    """Replace a folder that is already there."""


@dataclass(frozen=True)
class Verify:
    """Say whether ADAPTER was trained on MODEL, or (with --base and --adapter) whether MODEL is that base with that adapter
    merged into it, bit for bit. Reads checkpoints in safetensors without opening a model; exit code 0 means yes."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder."""
    of: Annotated[Positional[str | None], arg(metavar="ADAPTER")] = None
    """Adapter folder."""
    base: str | None = None
    """Model folder that MODEL was merged from."""
    adapter: str | None = None
    """Adapter folder that was merged into MODEL."""


@dataclass(frozen=True)
class Convert:
    """Turn an adapter of another format into the folder that deltaw and PEFT read, or such a folder into llama.cpp's or loralib's
    file."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Checkpoint of loralib (.pt, .bin or .ckpt), GGUF file of llama.cpp, or adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write, or a file that ends in .gguf (for llama.cpp), or in .bin or .pt (for loralib)."""
    base: str | None = None
    """Model folder or hub id of the base, whose config says how GGUF's tensors are named, and which of loralib's layers embed
    tokens or are convolutions."""
    alpha: float | None = None
    """α that the adapter was trained with; loralib's files do not say it."""
    parts: str | None = None
    """The parts of its merged layers that have updates, of query, key and value: for example q,v; or a digit a part, 101."""
    overwrite: bool = False
    """Replace what is already there."""


@dataclass(frozen=True)
class Extract:
    """Make an adapter out of a model that was fine-tuned whole: the nearest one of a rank, with its error in each layer."""

    base: Annotated[Positional[str], arg(metavar="BASE")]
    """Model folder or hub id."""
    tuned: Annotated[Positional[str], arg(metavar="TUNED")]
    """The same model, fine-tuned."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """Instead of a rank: the share of ‖W − W0‖² that each layer is to keep."""
    targets: str = "all-linear"
    """Which layers, as in training."""
    all_layers: bool = False
    """Show the error of every layer instead of one line for each kind."""
    overwrite: bool = False
    """Replace a folder that is already there."""


@dataclass(frozen=True)
class Compress:
    """Cut an adapter to fewer directions, in each layer the first of its ΔW, and say what is lost. The result is an ordinary
    adapter. `deltaw rank` says what the loss of these directions costs on held-out records."""

    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    """Adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    rank: int | None = None
    """The most that any layer keeps."""
    energy: float | None = None
    """Instead: the share of each layer's ‖ΔW‖² to keep, 0.99 say."""
    bytes: str | None = None
    """Instead: what the folder may take, 1MB say, spent where a byte keeps the most of ‖ΔW‖²."""
    all_layers: bool = False
    """Show every layer instead of one line for each kind."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Inspect:
    """Show what is in an adapter folder: layers, ranks, parameters, bytes, norms."""

    adapter: Adapter
    """Adapter folder."""
    all_layers: bool = False
    """A line for every layer instead of one for each kind."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Plan:
    """What training MODEL would take, from its config alone, for several methods side by side: parameters, checkpoints, memory by
    part, FLOPs, the largest batch."""

    model: Model
    """Model folder, GGUF file or hub id, of which the config is read and no weights; or, without any network: roberta-base,
    roberta-large, deberta-xxl, gpt2-medium, gpt2-large, gpt3-175b, llama-1b, llama-3b, llama-8b, llama-70b, llama-405b."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    json: bool = False
    """Print all numbers as JSON, in bytes."""


COMMANDS = {
    "train": Train, "plan": Plan, "compare": Compare, "sweep": Sweep, "rank": Rank, "generate": Generate, "chat": Chat,
    "eval": Eval, "merge": Merge, "unmerge": Unmerge, "verify": Verify, "convert": Convert, "extract": Extract,
    "compress": Compress, "inspect": Inspect,
}  # fmt: skip


# The methods that there are, at the end of the help of the commands that compare them
for _command in (Compare, Plan):
    _command.__doc__ = f"{_command.__doc__}\n\nMethods: {', '.join(PRESETS)}."


def check_flags(command: str, cls: type, words: Sequence[str]) -> None:
    """Raise one ConfigError with every flag in `words` that the command, whose settings are a `cls`, does not have. tyro, on
    meeting one, may complain of an argument that is missing because of it instead."""
    hints = typing.get_type_hints(cls, include_extras=True)
    positional = {
        name: m.metavar for name, hint in hints.items() for m in _metadata(hint) if getattr(m, "metavar", None)
    }
    known = {"help"} | {name.replace("_", "-") for name in keys(cls) if name not in positional}
    problems = []
    for word in words[: words.index("--") if "--" in words else None]:
        name = word.removeprefix("--").split("=")[0].replace("_", "-")
        if not word.startswith("--") or name in known or name.removeprefix("no-") in known:
            continue
        if name in positional:
            problems.append(f"--{name} is no flag: {positional[name]} stands by itself")
        else:
            others = [m for m in METHODS if command == "train" and name.replace("-", "_") in keys(train_with(m))]
            where = f" (a setting of --method {' or '.join(others)})" if others else ""
            near = "" if others else nearest("--" + name, ("--" + k for k in known))
            problems.append(f"unknown flag --{name}{where}{near}")
    if problems:
        usage = " ".join(("deltaw", command, *positional.values()))
        raise ConfigError("These flags cannot be used:", problems, f"Usage: {usage} [flags]; see --help.")


def _metadata(hint: object) -> tuple[typing.Any, ...]:
    return getattr(hint, "__metadata__", ())
