"""The commands as frozen dataclasses: arguments, flags and YAML keys, from the settings in config.py. Imports no torch."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from deltaw.cli.synonyms import answer
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
from deltaw.methods.registry import METHODS, method_class
from deltaw.methods.registry import PRESETS as METHOD_PRESETS
from deltaw.runs.memory.presets import PRESETS as MODEL_PRESETS

Model = Annotated[Positional[str], arg(metavar="MODEL")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
    """JSONL, JSON, CSV, TSV, parquet, text or Markdown file, a folder with splits or of documents, or a hub data set."""
    config: str | None = None
    """YAML file of any of these settings, MODEL and DATA included. Flags override it. Each run writes one as config.yaml."""
    resume: str | None = None
    """Run folder whose run goes on from its last saved state, with the settings that it was begun with; MODEL and DATA are not
    needed. A finished run is trained further with other --epochs, --steps or --minutes."""
    resume_with: str = ""
    """With --resume: settings, with commas, that may be others than those that the run was begun with, of epochs, steps, minutes,
    patience, out."""
    method: MethodName = "lora"
    """Method to train. Each has its settings: `deltaw train --method prefix --help` shows those of prefix."""
    settings: LoRA = field(default_factory=LoRA)
    run: TrainConfig = field(default_factory=TrainConfig)


@functools.cache
def train_with(method: str) -> type[Train]:
    """Return the train command with this method's settings. Raises ConfigError for an unknown method."""
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
    """Compare methods on MODEL and DATA for the same budget: quality, parameters, bytes, memory, time and latency. Resumes a
    comparison of the same settings."""

    model: Model
    """Hub id or model folder."""
    data: Data
    """Records, as in train."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out="runs/compare"))


@dataclass(frozen=True)
class Sweep:
    """Train at several ranks on MODEL and DATA and recommend the smallest that is enough, with 95% intervals. Shows quality,
    parameters and bytes of each. Resumes a sweep of the same settings."""

    model: Model
    """Hub id, model folder or GGUF file."""
    data: Data
    """Records, as in train."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out="runs/sweep"))
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Rank:
    """Find the rank that a finished run needed. Cuts its adapter to each smaller rank, scores these on held-out records, and
    recommends the smallest that is enough, with 95% intervals."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder or adapter folder."""
    rank: RankConfig = field(default_factory=RankConfig)
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Opening:
    """Opening of MODEL."""

    adapter: str | None = None
    """Adapter folder. Prompts are then wrapped as in its training, unless --template says otherwise."""
    any_base: bool = False
    """Load the adapter although it was trained on other base weights."""
    dtype: DType = "auto"
    """Precision of the weights."""
    device: str = "auto"
    """auto, cpu, cuda, mps …"""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a tokenizer beside an adapter. It can do whatever you can do on this
    machine. Without this flag a model that needs such code is refused."""


@dataclass(frozen=True)
class Generate:
    """Complete one prompt, a file of prompts, or standard input, with or without an adapter."""

    model: Model
    """Hub id, model folder or GGUF file."""
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None
    """The prompt. Without PROMPT and --file, each line of standard input is one."""
    file: str | None = None
    """File of prompts: records in any form that train reads, or a .txt file with a prompt a line."""
    out: str | None = None
    """JSONL file for {prompt, completion} records, instead of the screen."""
    json: bool = False
    """Print {prompt, completion} records for one prompt too, a line each."""
    opening: Opening = field(default_factory=Opening)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Chat:
    """Talk to MODEL in the terminal, with or without an adapter. /base and /adapter switch during the conversation."""

    model: Model
    """Hub id, model folder or GGUF file."""
    opening: Opening = field(default_factory=Opening)
    system: str | None = None
    """System message."""
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Eval:
    """Score MODEL on DATA with bootstrap 95% intervals; with --adapter the base and the adapter side by side."""

    model: Model
    """Hub id, model folder or GGUF file."""
    data: Data
    """Records with references, as in train. Records with the same prompt are one item with several references."""
    opening: Opening = field(default_factory=Opening)
    base: bool = True
    """Score the base too."""
    metrics: str | None = None
    """Scores, with commas. Texts: loss, perplexity, exact_match, bleu, rouge_l. Classes: loss, accuracy, f1, matthews. Numbers:
    loss, pearson, spearman. Default: all; for text records, which have no prompt, loss and perplexity."""
    most: int | None = None
    """Score only about the first so many records. All records of a prompt stay together."""
    out: str | None = None
    """JSON file for scores and predictions."""
    json: bool = False
    """Print the scores as JSON."""
    records: DataConfig = field(default_factory=DataConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Merge:
    """Merge ADAPTER into MODEL and write an ordinary model folder that needs no deltaw. A safetensors checkpoint is merged on
    disk, one tensor at a time, whatever its size."""

    model: Model
    """The adapter's base: hub id, model folder or GGUF file."""
    adapter: Adapter
    """Adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    any_base: bool = False
    """Merge although the adapter was trained on other base weights."""
    reversible: bool = False
    """Also write a correction file, a few percent of the model's size. With it, unmerge restores the base's bytes."""
    untie: bool = False
    """Give embedding and head a weight each where they share one and the adapter changes it for only one of them."""
    check: Literal["auto", "on", "off"] = "auto"
    """Load the merged model and compare its logits with the unmerged model's. auto: for models of up to 2 GB."""
    dtype: DType = "auto"
    """Precision of the merged weights. auto: the checkpoint's. Any other is merged in memory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a tokenizer beside an adapter. It can do whatever you can do on this
    machine. Without this flag a model that needs such code is refused."""
    all_layers: bool = False
    """Show a line for every layer, instead of one for each kind."""


@dataclass(frozen=True)
class Unmerge:
    """Take ADAPTER out of the model folder MERGED. After a merge with --reversible this restores the base's bytes, checked by
    their hash. Otherwise ΔW is subtracted, which is close."""

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
    """Check that ADAPTER was trained on MODEL; or, with --base and --adapter, that MODEL is exactly this base with this adapter
    merged into it. Reads safetensors without opening a model. Exit code 0 means yes."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder."""
    of: Annotated[Positional[str | None], arg(metavar="ADAPTER")] = None
    """Adapter folder."""
    base: str | None = None
    """Model folder that MODEL was merged from."""
    adapter: str | None = None
    """Adapter folder that was merged into MODEL."""


@dataclass(frozen=True)
class Push:
    """Put ADAPTER into the repository REPO on the hub, in one commit, with its card. The folder is checked first. Needs a token
    (`hf auth login`, or HF_TOKEN)."""

    adapter: Adapter
    """Adapter folder."""
    repo: Annotated[Positional[str], arg(metavar="REPO")]
    """Repository on the hub, OWNER/NAME. It is made where there is none."""
    base: str | None = None
    """The base's id on the hub, in place of the path that it was opened from."""
    private: bool = False
    """Make the repository private. A public one that is there already is refused."""
    dry_run: bool = False
    """Show which files would go, with their sizes, and push nothing."""


@dataclass(frozen=True)
class Export:
    """Write a whole model as a GGUF file for llama.cpp and Ollama, with a Modelfile. It is a merged folder, or an adapter, which
    is merged into its base first. Llama, Mistral, Qwen2 and Qwen3 with a byte-level BPE tokenizer."""

    source: Annotated[Positional[str], arg(metavar="MERGED_OR_ADAPTER")]
    """Model folder, or adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write: model.gguf and Modelfile."""
    to: Literal["gguf"] = "gguf"
    """Format to write."""
    type: Literal["q8_0", "f16", "f32"] = "q8_0"
    """Type of the matrices. Vectors are float32."""
    base: str | None = None
    """For an adapter: its base, a model folder or hub id. Default: the one that it names."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's tokenizer. It can do whatever you can do on this machine."""


@dataclass(frozen=True)
class Convert:
    """Convert an adapter of another program into a folder for deltaw and PEFT, or such a folder for another program."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder of PEFT, Unsloth, mlx-lm, litgpt or torchtune, or a file: kohya's or LyCORIS's .safetensors, llama.cpp's .gguf,
    ONNX Runtime's .onnx_adapter, litgpt's .lora, torchtune's or loralib's .pt, loralib's .bin or .ckpt."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write, or a file: .gguf for llama.cpp, .onnx_adapter for ONNX Runtime, .bin or .pt for loralib."""
    to: Literal["auto", "peft", "mlx-lm", "gguf", "onnx_adapter", "loralib"] = "auto"
    """Format to write. auto: by the ending of --out; a folder is PEFT's."""
    base: str | None = None
    """The base: model folder or hub id. Its config tells how GGUF, kohya and torchtune name or order what they hold, and which of
    loralib's layers are embeddings or convolutions. With other formats, layers and shapes are compared with it."""
    alpha: float | None = None
    """α of the adapter's training, which loralib's files do not contain, nor torchtune's and litgpt's without their settings."""
    parts: str | None = None
    """Parts of merged layers with updates (loralib, litgpt), among query, key and value: q,v or, with a digit a part, 101. Or
    which of the models in kohya's file: lora_unet, lora_te1."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a tokenizer beside an adapter. It can do whatever you can do on this
    machine. Without this flag a model that needs such code is refused."""
    overwrite: bool = False
    """Replace what is already there."""


@dataclass(frozen=True)
class Extract:
    """Extract an adapter from a fully fine-tuned model: the nearest one of a given rank, with its error in each layer."""

    base: Annotated[Positional[str], arg(metavar="BASE")]
    """Model folder or hub id."""
    tuned: Annotated[Positional[str], arg(metavar="TUNED")]
    """The same model, fine-tuned."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """Instead of --rank: the share of ‖W − W0‖² that each layer keeps, for example 0.9."""
    targets: str = "all-linear"
    """Layers to adapt, as in training."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a tokenizer beside an adapter. It can do whatever you can do on this
    machine. Without this flag a model that needs such code is refused."""
    all_layers: bool = False
    """Show a line for every layer, instead of one for each kind."""
    overwrite: bool = False
    """Replace a folder that is already there."""


@dataclass(frozen=True)
class Compress:
    """Cut an adapter to the largest directions of each layer's ΔW, and show the error. The result is an ordinary adapter.
    `deltaw rank` shows what a cut costs on held-out records."""

    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    """Adapter folder."""
    out: Annotated[str, arg(aliases=["-o"])]
    """Folder to write."""
    rank: int | None = None
    """Largest rank that any layer keeps."""
    energy: float | None = None
    """Instead of --rank: the share of each layer's ‖ΔW‖² to keep, for example 0.99."""
    bytes: str | None = None
    """Instead of --rank: most bytes of weights and settings, for example 1MB, spent where a byte keeps the most of ‖ΔW‖²."""
    all_layers: bool = False
    """Show a line for every layer, instead of one for each kind."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Survey:
    """Look at DATA before anything is trained on it: form, counts, lengths, copies, overlaps and odd records; with --model its
    tokens, and which of them are taught."""

    data: Data
    """JSONL, JSON, CSV or parquet file, a folder with splits, or a hub data set."""
    model: str | None = None
    """Model to encode the records for, exactly as train does: hub id, model folder or GGUF file."""
    valid: str | None = None
    """Held-out data: a file, or a split of DATA, as in train."""
    out: str | None = None
    """HTML file to write the page to."""
    json: bool = False
    """Print the results as JSON."""
    records: DataConfig = field(default_factory=DataConfig)
    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a tokenizer beside an adapter. It can do whatever you can do on this
    machine. Without this flag a model that needs such code is refused."""


@dataclass(frozen=True)
class Inspect:
    """Show what is in an adapter folder: layers, ranks, parameters, bytes, norms."""

    adapter: Adapter
    """Adapter folder."""
    all_layers: bool = False
    """Show a line for every layer, instead of one for each kind."""
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Plan:
    """Plan the training of MODEL with several methods, from its config alone: parameters, checkpoint sizes, memory by part, FLOPs
    and the largest batch."""

    model: Model
    """Model folder, GGUF file or hub id: its config is read, and no weights. Or, without a network, one of:"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    json: bool = False
    """Print the numbers as JSON, in bytes."""


COMMANDS: dict[str, type[DataclassInstance]] = {
    "data": Survey, "train": Train, "plan": Plan, "compare": Compare, "sweep": Sweep, "rank": Rank, "generate": Generate,
    "chat": Chat, "eval": Eval, "merge": Merge, "unmerge": Unmerge, "verify": Verify, "convert": Convert,
    "export": Export, "push": Push, "extract": Extract, "compress": Compress, "inspect": Inspect,
}  # fmt: skip


CHOICES: dict[tuple[type, str], Iterable[str]] = {
    (CompareConfig, "methods"): METHOD_PRESETS, (PlanConfig, "methods"): METHOD_PRESETS, (Plan, "model"): MODEL_PRESETS,
}  # fmt: skip
"""Class and field → names that the field's help ends in."""


def check_flags(command: str, cls: type[DataclassInstance], words: Sequence[str]) -> None:
    """Raise one ConfigError with every flag in `words` that the command, whose settings are a `cls`, does not have.

    tyro would instead complain of an argument that is missing because of such a flag.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    positional = {name: metavar for name, hint in hints.items() if (metavar := _metavar(hint))}
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
            settings = {k.replace("-", "_") for k in known} | set(positional.values())
            meant = where or answer(name, settings, lambda setting: "--" + setting.replace("_", "-"))
            near = "" if meant else nearest("--" + name, ("--" + k for k in known))
            problems.append(f"unknown flag --{name}{meant}{near}")
    if problems:
        usage = " ".join(("deltaw", command, *positional.values()))
        raise ConfigError(
            "These flags cannot be used:", problems, f"Usage: {usage} [flags]; see deltaw {command} --help."
        )


def _metavar(hint: object) -> str | None:
    """The word in capitals for an argument without a flag."""
    metadata: tuple[object, ...] = getattr(hint, "__metadata__", ())
    return next((metavar for entry in metadata if (metavar := getattr(entry, "metavar", None))), None)
