"""A tokenizer as llama.cpp wants it: tokens, their kinds, merges, end tokens, chat template. Byte-level BPE alone.

llama.cpp has the ways of splitting a text before the merges under names of its own. They are told here by the settings in
tokenizer.json; a way that it is not known to have is refused, since it would split texts silently otherwise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deltaw.errors import FileError
from deltaw.files.formats import gguf, model_folder
from deltaw.files.formats.strict_json import read_object

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Regular expression before the bytes → llama.cpp's name
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """The contents of a tokenizer."""

    tokens: list[str]
    kinds: list[int]
    """llama.cpp's kinds of tokens."""
    merges: list[str]
    pre: str
    """llama.cpp's name of the way to split a text."""
    special: dict[str, int]
    """The gguf package's name of a special token → its id."""
    ends: list[int]
    """Tokens that end an answer; the first is the tokenizer's."""
    begins: bool
    """A text begins with the BOS token."""
    template: str | None

    def add_to(self, writer: Any) -> None:
        """Add it to a file that is being written."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_space_prefix(False)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(folder: Path, size: int, *, trust_remote_code: bool = False) -> Vocabulary:
    """Return the tokenizer of a model folder with `size` rows. Raises FileError for one that llama.cpp has no form for."""
    if not (folder / "tokenizer.json").is_file():
        raise FileError(f"{folder} has no tokenizer.json, so its tokenizer cannot be written as GGUF.")
    tokenizer = model_folder.open_tokenizer(folder, trust_remote_code=trust_remote_code)
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _split_of(parts, folder)
    kind = gguf.package().TokenType
    added = {entry["id"]: entry for entry in parts["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if (most := max(by_id)) >= size:
        raise FileError(f"The tokenizer in {folder} has tokens up to {most}, the model rows for {size}.")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [
        (kind.CONTROL if added[i]["special"] else kind.USER_DEFINED) if i in added
        else kind.NORMAL if i in by_id else kind.UNUSED
        for i in range(size)
    ]  # fmt: skip
    names = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad"}
    special = {ours: n for ours, name in names.items() if (n := getattr(tokenizer, f"{name}_token_id")) is not None}
    ends = _ends(folder, special.get("eos"))
    if more := [end for end in ends if end != special.get("eos")]:
        special |= {"eot": more[0]} | ({} if "eos" in special else {"eos": more[0]})
    ids = tokenizer("a").input_ids
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    return Vocabulary(
        tokens,
        [int(k) for k in kinds],
        merges,
        pre,
        special,
        ends,
        bool(ids) and ids[0] == special.get("bos"),
        template,
    )


def _ends(folder: Path, eos: int | None) -> list[int]:
    """Return the tokens at which the model's generation stops, the tokenizer's first."""
    path = folder / model_folder.GENERATION_CONFIG
    value = read_object(path).get("eos_token_id") if path.is_file() else None
    named = cast("list[int]", value if isinstance(value, list) else [] if value is None else [value])
    return list(dict.fromkeys(([] if eos is None else [eos]) + named))


def _split_of(parts: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of how a tokenizer splits a text before its merges. Raises FileError for another."""
    if parts["model"].get("type") != "BPE" or parts["model"].get("byte_fallback"):
        raise FileError(
            f"The tokenizer in {folder} is no byte-level BPE (it is {parts['model'].get('type')!r} over characters): llama.cpp's "
            "convert_hf_to_gguf.py writes it, from the merged folder."
        )
    steps = parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    name = None
    if len(levels) == 1 and not levels[0].get("add_prefix_space"):
        by_words = levels[0].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_words:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and by_words and steps[0].get("individual_digits"):
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not by_words:
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    if name is None or (parts.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise FileError(
            f"The tokenizer in {folder} splits texts in a way that this version does not know llama.cpp's name of: "
            f"{json.dumps(parts['pre_tokenizer'])[:300]}"
        )
    return name
