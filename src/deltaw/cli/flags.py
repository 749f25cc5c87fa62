"""The commands as frozen dataclasses: arguments and flags, from the settings in config.py. Imports no torch.

The first sentence under a field is its flag's help; words.py reads the command line, usage.py lays out the help.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from deltaw.config import (
    CompareConfig,
    DataConfig,
    DType,
    GenerateConfig,
    PlanConfig,
    RankConfig,
    SweepConfig,
    TrainConfig,
    Trusting,
)
from deltaw.methods.lora import LoRA
from deltaw.methods.registry import METHODS, method_class
from deltaw.methods.registry import PRESETS as METHOD_PRESETS
from deltaw.runs.memory.presets import PRESETS as MODEL_PRESETS


class Positional(NamedTuple):
    """Mark of an argument without a flag."""

    metavar: str


class Short(NamedTuple):
    """Mark of a flag that has a short form too."""

    flag: str


Model = Annotated[str, Positional("MODEL")]
Data = Annotated[str, Positional("DATA")]
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
Adapter = Annotated[str, Positional("ADAPTER")]
Out = Annotated[str, Short("-o")]


@dataclass(frozen=True)
class Train:
    """Train a low-rank update of MODEL on DATA; writes a run folder with the adapter and a report."""

    model: Model
    """Hub id, model folder or GGUF file."""
    data: Data
    """JSONL, JSON, CSV, TSV, parquet, text or Markdown file, a folder with splits or of documents, or a hub data set."""
    config: str | None = None
    """YAML file of any of these settings, MODEL and DATA included, which flags override. Each run writes one as config.yaml."""
    resume: str | None = None
    """Run folder whose run goes on from its last saved state and with its settings, without MODEL and DATA. A finished run is
    trained further with other --epochs, --steps or --minutes."""
    resume_with: str = ""
    """Settings that --resume may change, with commas: epochs, steps, minutes, patience, out."""
    method: MethodName = "lora"
    """Method to train, with settings of its own that `--method prefix --help` shows."""
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

    run: Annotated[str, Positional("RUN")]
    """Run folder or adapter folder."""
    rank: RankConfig = field(default_factory=RankConfig)
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Opening(Trusting):
    """Opening of MODEL."""

    adapter: str | None = None
    """Adapter folder, as whose training prompts are wrapped unless --template says otherwise."""
    any_base: bool = False
    """Load the adapter although it was trained on other base weights."""
    dtype: DType = "auto"
    """Precision of the weights. auto: the checkpoint's, or float32 on a CPU that is no faster in bfloat16."""
    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:1, mps. auto: a GPU if there is one."""


@dataclass(frozen=True)
class Generate:
    """Complete one prompt, a file of prompts, or standard input, with or without an adapter."""

    model: Model
    """Hub id, model folder or GGUF file."""
    prompt: Annotated[str | None, Positional("PROMPT")] = None
    """The prompt; - takes all of standard input as one, and without it each line there is a prompt or a JSON record."""
    file: str | None = None
    """File of prompts: records or messages in any form that train reads, or a .txt file with a prompt a line."""
    prompt_file: str | None = None
    """Text file that is one prompt, of as many lines as it has."""
    out: str | None = None
    """JSONL file for {prompt, completion} records, instead of the screen."""
    json: bool = False
    """Print {prompt, completion} records for one prompt too, a line each."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Show the answer to one prompt as it comes. auto: in a terminal."""
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
    """Scores, with commas: loss, perplexity, exact_match, bleu, rouge_l; for classes loss, accuracy, f1, matthews; for
    numbers loss, pearson, spearman. Text records, which have no prompt, have loss and perplexity alone. Default: all that the
    records allow."""
    most: int | None = None
    """Score only about the first so many records, those of one prompt together."""
    out: str | None = None
    """JSON file for scores and predictions."""
    json: bool = False
    """Print the scores as JSON."""
    records: DataConfig = field(default_factory=DataConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Merge(Trusting):
    """Merge ADAPTER into MODEL and write an ordinary model folder that needs no deltaw. A safetensors checkpoint is merged on
    disk, one tensor at a time, whatever its size."""

    model: Model
    """The adapter's base: hub id, model folder or GGUF file."""
    adapter: Adapter
    """Adapter folder."""
    out: Out
    """Folder to write."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    any_base: bool = False
    """Merge although the adapter was trained on other base weights."""
    reversible: bool = False
    """Also write a correction file, a few percent of the model's size, with which unmerge restores the base's bytes."""
    untie: bool = False
    """Give embedding and head a weight each where they share one and the adapter changes it for only one of them."""
    check: Literal["auto", "on", "off"] = "auto"
    """Load the merged model and compare its logits with the unmerged model's. auto: for models of up to 2 GB."""
    dtype: DType = "auto"
    """Precision of the merged weights. auto: the checkpoint's. Another one is merged in memory."""
    all_layers: bool = False
    """Show a line for every layer, instead of one for each kind."""


@dataclass(frozen=True)
class Unmerge:
    """Take ADAPTER out of the model folder MERGED. After a merge with --reversible this restores the base's bytes, checked by
    their hash. Otherwise ΔW is subtracted, which is close."""

    merged: Annotated[str, Positional("MERGED")]
    """Folder that merge wrote."""
    adapter: Adapter
    """Adapter folder."""
    out: Out
    """Folder to write."""
    overwrite: bool = False
    """Replace a folder that is already there."""


@dataclass(frozen=True)
class Verify:
    """Check that ADAPTER was trained on MODEL; or, with --base and --adapter, that MODEL is exactly this base with this adapter
    merged into it. Reads safetensors without opening a model. Exit code 0 means yes."""

    model: Annotated[str, Positional("MODEL")]
    """Model folder."""
    of: Annotated[str | None, Positional("ADAPTER")] = None
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
    repo: Annotated[str, Positional("REPO")]
    """Repository on the hub, OWNER/NAME, which is made where there is none."""
    base: str | None = None
    """The base's id on the hub, in place of the path that it was opened from."""
    private: bool = False
    """Make the repository private; a public one that is there already is refused."""
    dry_run: bool = False
    """Show which files would go, with their sizes, and push nothing."""


@dataclass(frozen=True)
class Export(Trusting):
    """Write a whole model as a GGUF file for llama.cpp and Ollama, with a Modelfile. It is a merged folder, or an adapter, which
    is merged into its base first. Llama, Mistral, Qwen2 and Qwen3 with a byte-level BPE tokenizer."""

    source: Annotated[str, Positional("MERGED_OR_ADAPTER")]
    """Model folder, or adapter folder."""
    out: Out
    """Folder to write: model.gguf and Modelfile."""
    to: Literal["gguf"] = "gguf"
    """Format to write."""
    type: Literal["q8_0", "q4_0", "f16", "f32"] = "q8_0"
    """Type of the matrices; vectors are float32, and of q4_0 the embedding and the head are q8_0."""
    base: str | None = None
    """Base of an adapter: a model folder or hub id. Default: the one that it names."""
    overwrite: bool = False
    """Replace a folder that is already there."""


@dataclass(frozen=True)
class Convert(Trusting):
    """Convert an adapter of another program into a folder for deltaw and PEFT, or such a folder for another program."""

    source: Annotated[str, Positional("SOURCE")]
    """A folder of PEFT, Unsloth, mlx-lm, litgpt or torchtune, or a file: kohya's or LyCORIS's .safetensors, llama.cpp's .gguf,
    ONNX Runtime's .onnx_adapter, litgpt's .lora, torchtune's or loralib's .pt, loralib's .bin or .ckpt."""
    out: Out
    """Folder to write, or a file: .gguf for llama.cpp, .onnx_adapter for ONNX Runtime, .bin or .pt for loralib."""
    to: Literal["auto", "peft", "mlx-lm", "gguf", "onnx_adapter", "loralib"] = "auto"
    """Format to write. auto: by the ending of --out; a folder is PEFT's."""
    base: str | None = None
    """The base, whose config tells the layers' names, kinds and rows: model folder or hub id. Files of GGUF, kohya and torchtune
    need it."""
    alpha: float | None = None
    """α of the adapter's training, which loralib's files do not contain, nor torchtune's and litgpt's without their settings."""
    parts: str | None = None
    """Parts of merged layers with updates, among query, key and value: q,v or, with a digit a part, 101; of kohya's files the
    model that is meant, such as lora_unet."""
    overwrite: bool = False
    """Replace what is already there."""


@dataclass(frozen=True)
class Extract(Trusting):
    """Extract an adapter from a fully fine-tuned model: the nearest one of a given rank, with its error in each layer."""

    base: Annotated[str, Positional("BASE")]
    """Model folder or hub id."""
    tuned: Annotated[str, Positional("TUNED")]
    """The same model, fine-tuned."""
    out: Out
    """Folder to write."""
    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """Instead of --rank: the share of ‖W − W0‖² that each layer keeps, for example 0.9."""
    targets: str = "all-linear"
    """Layers to adapt, as in training."""
    all_layers: bool = False
    """Show a line for every layer, instead of one for each kind."""
    overwrite: bool = False
    """Replace a folder that is already there."""


@dataclass(frozen=True)
class Compress:
    """Cut an adapter to the largest directions of each layer's ΔW, and show the error. The result is an ordinary adapter.
    `deltaw rank` shows what a cut costs on held-out records."""

    adapter: Annotated[str, Positional("ADAPTER")]
    """Adapter folder."""
    out: Out
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
class Survey(Trusting):
    """Look at DATA before anything is trained on it: form, counts, lengths, copies, overlaps and odd records; with --model its
    tokens, and which of them are taught."""

    data: Data
    """Records, as in train."""
    model: str | None = None
    """Model to encode the records for, exactly as train does: hub id, model folder or GGUF file."""
    valid: str | None = None
    """Held-out data: a file, or a split of DATA, as in train."""
    out: str | None = None
    """HTML file to write the page to."""
    json: bool = False
    """Print the results as JSON."""
    records: DataConfig = field(default_factory=DataConfig)


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
    """Model folder, GGUF file or hub id, of which the config alone is read; or, without a network, one of the names that
    follow."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    json: bool = False
    """Print the numbers as JSON, in bytes."""


@dataclass(frozen=True)
class Doctor:
    """Show the machine as deltaw sees it: versions, devices, threads, disks, which fast ways are open, and what is slow here and
    why."""

    json: bool = False
    """Print the facts as JSON."""


COMMANDS: dict[str, type[DataclassInstance]] = {
    "data": Survey, "train": Train, "plan": Plan, "compare": Compare, "sweep": Sweep, "rank": Rank, "generate": Generate,
    "chat": Chat, "eval": Eval, "merge": Merge, "unmerge": Unmerge, "verify": Verify, "convert": Convert,
    "export": Export, "push": Push, "extract": Extract, "compress": Compress, "inspect": Inspect,
    "doctor": Doctor,
}  # fmt: skip


CHOICES: dict[tuple[type, str], Iterable[str]] = {
    (CompareConfig, "methods"): METHOD_PRESETS, (PlanConfig, "methods"): METHOD_PRESETS, (Plan, "model"): MODEL_PRESETS,
}  # fmt: skip
"""Class and field → names that the field's help ends in."""


NOT_TAKEN = {"Generate": {"max_length", "too_long", "turns"}}
"""Command's class → settings of its records that it has no use for, which are no flags of it: it reads whole prompts."""

OTHER_TEXTS = {
    ("Generate", "max_records"): "Take the first so many prompts. At least 1. Default: all.",
    ("Eval", "max_records"): "Score a random sample of at most this many records. At least 1. Default: all.",
}
"""Command's class and setting → its help there, where the setting is not about training."""


SECTIONS = {
    "Train": "data train plan compare sweep rank",
    "Use": "generate chat eval",
    "Adapters and models": "inspect merge unmerge verify extract compress convert export push",
    "This machine": "doctor",
}
"""Title in `deltaw --help` → commands."""

EXAMPLES = {
    "data": "deltaw data examples.jsonl --model Qwen/Qwen3-0.6B",
    "train": "deltaw train Qwen/Qwen3-0.6B examples.jsonl --rank 16 --out runs/mine",
    "plan": "deltaw plan roberta-large --methods lora,full --memory 16GB",
    "compare": "deltaw compare google-bert/bert-base-uncased reviews.jsonl --quick",
    "sweep": "deltaw sweep Qwen/Qwen3-0.6B examples.jsonl --ranks 8,1,2,4 --minutes 10",
    "rank": "deltaw rank runs/mine --confirm",
    "generate": 'deltaw generate Qwen/Qwen3-0.6B "Hello!" --adapter runs/mine/adapter',
    "chat": "deltaw chat Qwen/Qwen3-0.6B --adapter runs/mine/adapter",
    "eval": "deltaw eval Qwen/Qwen3-0.6B test.jsonl --adapter runs/mine/adapter",
    "merge": "deltaw merge Qwen/Qwen3-0.6B runs/mine/adapter -o merged --reversible",
    "unmerge": "deltaw unmerge merged runs/mine/adapter -o base",
    "verify": "deltaw verify merged --base base --adapter runs/mine/adapter",
    "convert": "deltaw convert runs/mine/adapter -o mine.gguf --base Qwen/Qwen3-0.6B",
    "export": "deltaw export runs/mine/adapter -o served --type q8_0",
    "push": "deltaw push runs/mine/adapter me/my-adapter --dry-run",
    "extract": "deltaw extract base tuned -o extracted --rank 16",
    "compress": "deltaw compress runs/mine/adapter -o small --energy 0.99",
    "inspect": "deltaw inspect runs/mine/adapter",
    "doctor": "deltaw doctor",
}
"""Command → an example that its help shows."""

COMMON = {
    "data": "model out json",
    "train": "method rank alpha targets lr epochs steps batch max_length out config resume resume_with",
    "plan": "methods batch length memory json",
    "compare": "methods quick lr epochs steps minutes batch max_length out",
    "sweep": "ranks lrs targets method seeds lr epochs steps minutes batch max_length out json",
    "rank": "ranks margin records confirm seeds out json",
    "generate": "adapter file prompt_file max_new_tokens temperature batch out stream json",
    "chat": "adapter system max_new_tokens temperature",
    "eval": "adapter metrics most max_new_tokens batch out json",
    "merge": "out reversible overwrite dtype",
}
"""Command → the flags that its help begins with. Other commands have few."""
