"""README.md of an adapter folder: the card that the hub shows. No model code.

It is made of the settings and the metadata alone, so no record's text is in it, and paths are cut to their last part. A card that
somebody has edited, or written, stays: its last line has a hash of the lines before, by which an untouched one is told.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from safetensors import safe_open

from deltaw.errors import visible
from deltaw.files.formats.atomic import write_text
from deltaw.files.formats.peft.config import WEIGHTS, PeftConfig, read_config
from deltaw.files.formats.peft.metadata import REFUSED, TRAINING
from deltaw.files.formats.strict_json import parse_object

NAME = "README.md"
_SEAL = re.compile(r"\n<!-- written by deltaw, sha256:([0-9a-f]{64}) -->\n\Z")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+/?$")
# Settings of a run that are shown; all others may hold paths or texts of the user
_SHOWN = (
    "steps_taken", "epochs", "batch", "lr", "lr_ratio", "optimizer", "schedule", "warmup", "weight_decay", "clip", "dropout",
    "max_length", "dtype", "seed", "template", "init",
)  # fmt: skip
# Marks of Markdown and HTML → what stands for them in a name
_MARKS = str.maketrans({"`": "'", "|": "/", "<": "(", ">": ")"})
_TASKS = {
    "causal": ("CAUSAL_LM", "text-generation"), "seq2seq": ("SEQ_2_SEQ_LM", "text2text-generation"),
    "classification": ("SEQ_CLS", "text-classification"), "regression": ("SEQ_CLS", "text-classification"),
    "image": (None, "image-classification"),
}  # fmt: skip
_PIPELINES = {peft: pipeline for peft, pipeline in _TASKS.values() if peft is not None}
_AUTO = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification", "SEQ_2_SEQ_LM": "Seq2SeqLM"}


def base_name(name: str | None) -> str | None:
    """Return the hub's id where a base was opened from the hub's cache; else the name or path as it is.

    >>> base_name("/home/me/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0a1b")
    'HuggingFaceTB/SmolLM2-135M'
    """
    cached = _CACHED.search(name) if name else None
    return cached[1].replace("--", "/") if cached else name


def public_name(name: str | None) -> str | None:
    """Return a base's name without a path: the hub's id, or the folder's own name.

    A folder's begins with ./, so that no reader takes it for the id of another model on the hub.

    >>> public_name("org/model"), public_name("/home/me/models/gpt2")
    ('org/model', './gpt2')
    """
    name = base_name(name)
    if not name or hub_id(name) is not None:
        return name or None
    last = PureWindowsPath(PurePath(name).name).name
    return f"./{last}" if last not in ("", ".", "..") else None


def hub_id(name: str | None) -> str | None:
    """Return a base's name where it is an id on the hub, and no folder here; else None.

    >>> hub_id("org/model"), hub_id("/data/model")
    ('org/model', None)
    """
    name = base_name(name)
    return name if name and _ID.fullmatch(name) and not Path(name).exists() else None


def short_name(name: object) -> str:
    """Return a path's last part, and an id as it is, on one line and without marks of Markdown.

    >>> short_name("/home/me/data/train.jsonl"), short_name("org/data")
    ('train.jsonl', 'org/data')
    """
    text = base_name(str(name)) or ""
    if not (_ID.fullmatch(text) and not Path(text).exists()):
        text = PureWindowsPath(PurePath(text).name).name
    return " ".join(visible(text).translate(_MARKS).split())


@dataclass(frozen=True)
class Card:
    """The contents of a card."""

    config: PeftConfig
    training: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings, as the adapter's metadata have them; empty for other adapters."""
    base: str | None = None
    """The base's id on the hub. Default: the one that the settings name."""
    scores: Mapping[str, str] = field(default_factory=dict)
    """Name → value, as it is shown."""
    refused: Mapping[str, Any] = field(default_factory=dict)
    """Why PEFT does not load the adapter → the layers to blame."""

    def text(self) -> str:
        """Return the file's text."""
        body = "\n\n".join(part for part in (self._front(), *self._parts()) if part) + "\n"
        return f"{body}\n<!-- written by deltaw, sha256:{_hash(body)} -->\n"

    @property
    def _of_peft(self) -> bool:
        return self.config.peft_type is not None and not self.refused

    @property
    def _method(self) -> str:
        config = self.config
        if config.method or config.peft_type in ("IA3", "PROMPT_TUNING"):
            return config.method or {"IA3": "(IA)³", "PROMPT_TUNING": "prompt tuning"}[config.peft_type or ""]
        return ("DoRA" if config.use_dora else "LoRA") + (" (rsLoRA's scale α/√r)" if config.use_rslora else "")

    @property
    def _task(self) -> str | None:
        return self.config.task_type or _TASKS.get(str(self.training.get("task")), (None, ""))[0]

    def _front(self) -> str:
        """Return the YAML block, whose texts are JSON's."""
        base = self.base or hub_id(self.config.base_model_name_or_path)
        tags = ["deltaw", *(["lora"] if self.config.peft_type == "LORA" else []), "transformers"]
        values: dict[str, object] = {
            "base_model": base,
            "library_name": "peft" if self._of_peft else "deltaw",
            "license": "unknown",
            "pipeline_tag": _PIPELINES.get(self._task or ""),
            "tags": [*([f"base_model:adapter:{base}"] if base else []), *tags],
        }
        lines = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in values.items() if v is not None]
        return "\n".join(["---", *lines, "---"])

    def _parts(self) -> list[str]:
        base, data = self.base or self.config.base_model_name_or_path, self.training.get("data")
        title = f"# {self._method} adapter" + (f" of {short_name(base)}" if base else "")
        facts = {"base": short_name(base) if base else "not named", "method": self._method, **self._settings()}
        if data:
            facts["data"] = short_name(data)
        parts = [title, _table(facts)]
        shown = {
            key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in self._trained().items()
        }
        parts += ["## Training", _table(shown)] if shown else []
        parts += ["## Scores", _table(self.scores)] if self.scores else []
        return [*parts, "## Use", self._use(), "The license above is to be set by whoever publishes this adapter."]

    def _settings(self) -> dict[str, str]:
        """Return rank, α and targets."""
        config = self.config
        if config.peft_type != "LORA":
            return {}
        targets = config.target_modules
        names = [*([targets] if isinstance(targets, str) else targets or ()), *config.target_parameters]
        varied = " (other layers have ranks or α's of their own)" if config.rank_pattern or config.alpha_pattern else ""
        settings = {"rank": f"{config.r}{varied}", "alpha": f"{config.lora_alpha:g}", "targets": ", ".join(names)}
        if config.modules_to_save:
            settings["trained whole"] = ", ".join(config.modules_to_save)
        return {key: _one_line(value) for key, value in settings.items()}

    def _trained(self) -> dict[str, int | float | str]:
        """Return the run's settings that are numbers or one of deltaw's words."""
        known = {key: self.training[key] for key in _SHOWN if key in self.training}
        if self.training.get("steps"):  # which count in the place of epochs
            known.pop("epochs", None)
        words = re.compile(r"[\w./+-]{1,30}")
        return {
            key.replace("_", " "): value
            for key, value in known.items()
            if isinstance(value, int | float) or (isinstance(value, str) and words.fullmatch(value))
        }

    def _use(self) -> str:
        """Return how the adapter is used here and in PEFT."""
        base = short_name(self.base or self.config.base_model_name_or_path or "BASE")
        command = "generate" if self._task != "SEQ_CLS" else "eval"
        what = "PROMPT" if command == "generate" else "DATA"
        here = f"```sh\ndeltaw {command} {shlex.quote(base)} {what} --adapter ADAPTER\n```"
        if self.refused:
            reasons = "; ".join(
                f"{_one_line(why)} ({', '.join(map(_one_line, _listed(names)))})" for why, names in self.refused.items()
            )
            return f"ADAPTER is this folder. PEFT 0.21 does not load it: {reasons}. deltaw does:\n\n{here}"
        if not self._of_peft:
            return f"ADAPTER is this folder. PEFT has no such method; deltaw reads it:\n\n{here}"
        auto, labels = _AUTO.get(self._task or ""), self.training.get("labels")
        if self._task == "SEQ_CLS":
            known = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
            arguments = (
                f", id2label={dict(enumerate(labels))!r}" if known and labels else ", num_labels=1" * (not labels)
            )
            arguments += f", label2id={ {name: i for i, name in enumerate(labels)}!r}" if known and labels else ""
        else:
            arguments = ""
        lines = [f"from transformers import AutoModel{f'For{auto}' if auto else ''}", "from peft import PeftModel", ""]
        lines += [f"base = AutoModel{f'For{auto}' if auto else ''}.from_pretrained({base!r}{arguments})"]
        lines += ['model = PeftModel.from_pretrained(base, "ADAPTER")']
        python = "\n".join(lines)
        return f"ADAPTER is this folder, or its id on the hub.\n\n{here}\n\n```python\n{python}\n```"


def card_of(config: PeftConfig, metadata: Mapping[str, str]) -> Card:
    """Return the card of an adapter with these settings, and this metadata of its tensors."""
    return Card(config, _object(metadata, TRAINING), refused=_object(metadata, REFUSED))


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return what the metadata has under a key; nothing where that is damaged."""
    try:
        return parse_object(metadata.get(key, "{}"))
    except ValueError:
        return {}


def _listed(names: object) -> list[str]:
    """Return some names, the first four of them."""
    some = [str(name) for name in names] if isinstance(names, list) else []
    return some if len(some) <= 4 else [*some[:4], f"and {len(some) - 4} more"]


def is_ours(path: Path) -> bool:
    """Return whether a card can be written at this path: nothing is there, or a card of deltaw's that nobody has edited."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    seal = _SEAL.search(text)
    return seal is not None and _hash(text[: seal.start()]) == seal[1]


def write_card(folder: Path, card: Card) -> bool:
    """Write a folder's card, atomically, where none is there that somebody has edited. Return whether it was written."""
    if not is_ours(folder / NAME):
        return False
    write_text(folder / NAME, card.text())
    return True


def add_scores(folder: Path, scores: Mapping[str, str]) -> bool:
    """Write an adapter folder's card again, with these scores. Return whether it was written."""
    with safe_open(folder / WEIGHTS, "pt") as file:  # type: ignore[no-untyped-call]
        metadata: dict[str, str] = file.metadata() or {}
    return write_card(folder, dataclasses.replace(card_of(read_config(folder), metadata), scores=scores))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {_one_line(name)} | {_one_line(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _one_line(text: str) -> str:
    """Return a text for a cell of a table."""
    return " ".join(visible(text).replace("|", "\\|").replace("<", "&lt;").split())


def scores_in(text: str) -> dict[str, str]:
    """Return the scores in a card's text.

    >>> scores_in(Card(PeftConfig.of({"peft_type": "LORA"}), scores={"loss": "1.5"}).text())
    {'loss': '1.5'}
    """
    section = re.search(r"\n## Scores\n\n\| \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    rows = [line.strip("| ").split(" | ", 1) for line in section[1].splitlines()] if section else []
    return {row[0]: row[1] for row in rows if len(row) == 2}
