"""Files beside the weights of a model or an adapter: its tokenizer and chat template, and at which tokens it stops.

A tokenizer in an adapter's folder is used where it is another one than the base's. No model code.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import BaseMismatch, FileError, first_line, listing
from deltaw.model.ends import extended

log = logging.getLogger("deltaw")

TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_MORE_TEMPLATES = "additional_chat_templates"
# Files that hold tokens, as transformers' tokenizers name them; any of the first makes a tokenizer with the others
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "vocab.bpe", "tiktoken.model", "tekken.json", "source.spm", "bpe.codes",
)  # fmt: skip
_BESIDE = (
    _CONFIG, TEMPLATE, "chat_template.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "target.spm",
    "target_vocab.json", "normalizer.json", "dict.txt",
)  # fmt: skip
# Sections of tokenizer.json that hold how it was last used, not what it is
_STATE = ("padding", "truncation")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SHOWN = 5


def files_in(folder: Path) -> list[Path]:
    """The files and folders of a tokenizer or chat template in a folder."""
    names = (*_VOCABULARIES, *_BESIDE, _MORE_TEMPLATES)
    return [path for name in names if (path := folder / name).exists()]


def contents(folder: Path) -> dict[str, bytes]:
    """Name in the folder → content, of a tokenizer's files."""
    inside = (path.rglob("*") if path.is_dir() else [path] for path in files_in(folder))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for paths in inside for p in paths if p.is_file()}


def open_tokenizer(source: str | Path, **arguments: Any) -> Any:
    """The tokenizer of a folder or hub id. Raises FileError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = first_line(error)
        raise FileError(
            f"The tokenizer in {source} cannot be opened: {reason}\nBeside an adapter: without its files the base's is used."
        ) from error


def brought(folder: Path, base: Any, *, config: Any = None, check: bool = True) -> Any | None:
    """The tokenizer that an adapter's folder has, where it is another one than `base`, the base's tokenizer (None: it has none).
    Log what is other. A folder that has a chat template alone gives the base's tokenizer with it. `config` is the model's.

    Raises FileError for a tokenizer that cannot be opened; BaseMismatch where it gives the ids of the base's ordinary tokens
    to other ones, which `check=False` makes a warning."""
    if not files_in(folder):
        return None
    if not _has_tokens(folder):
        own = _with_template(folder, base)
        if (folder / "added_tokens.json").is_file():
            log.warning("%s has added tokens, but no vocabulary that these were added to: they are left out.", folder)
        if own is not None:
            log.warning("The chat template is the one in %s; the base has another one, or none.", folder)
        return own
    own = open_tokenizer(folder, **({} if config is None else {"config": config}))
    if base is None:
        log.warning("The tokenizer is the one in %s; the base has none.", folder)
        return own
    new = _check_ids(folder, own, base, check)
    others = differences(own, base)
    if not others:
        return None
    added = f"; new: {_some(new)}" if new else ""
    log.warning("The tokenizer is the one in %s. Other than in the base's: %s%s.", folder, " and ".join(others), added)
    return own


def _with_template(folder: Path, base: Any) -> Any | None:
    template = template_in(folder)
    if template is None or base is None or template == getattr(base, "chat_template", None):
        return None
    own = copy.deepcopy(base)
    own.chat_template = template
    return own


def template_in(folder: Path) -> Any | None:
    """A folder's chat template: a text, or several by their names. Raises FileError for files that cannot be read."""
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        for name in ("chat_template.json", _CONFIG):
            if (folder / name).is_file():
                held = json.loads((folder / name).read_text(encoding="utf-8"))
                template = held.get("chat_template") if isinstance(held, dict) else None
                if isinstance(template, list):
                    return {entry["name"]: entry["template"] for entry in template}
                if template:
                    return template
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"The chat template in {folder} cannot be read: {error!r}") from error
    return None


def differences(own: Any, base: Any) -> list[str]:
    """In which of these a tokenizer is another one than `base`: tokens, special tokens, chat template."""
    found = []
    if _tokens(own) != _tokens(base):
        found.append("tokens")
    if any(str(getattr(own, name, None)) != str(getattr(base, name, None)) for name in _SPECIAL):
        found.append("special tokens")
    if getattr(own, "chat_template", None) != getattr(base, "chat_template", None):
        found.append("chat template")
    return found


def differs(tokenizer: Any, base: str | None) -> bool:
    """Whether a tokenizer, or a folder's, is another one than that of the base of this name; yes where one of them cannot be
    opened."""
    try:
        own = tokenizer
        theirs = open_tokenizer(base, local_files_only=True) if base else None
        if isinstance(tokenizer, Path):
            own = open_tokenizer(tokenizer) if _has_tokens(tokenizer) else _with_template(tokenizer, theirs)
        return theirs is None or (own is not None and bool(differences(own, theirs)))
    except FileError:
        return True


def _has_tokens(folder: Path) -> bool:
    """Whether a folder has a tokenizer, and not a chat template alone."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def _tokens(tokenizer: Any) -> Any:
    """What decides which tokens a text becomes: of a fast tokenizer all of tokenizer.json but its state, else the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in _STATE}


def _check_ids(folder: Path, own: Any, base: Any, check: bool) -> list[str]:
    """The tokens that the base's tokenizer has no ids for. Raises BaseMismatch for ids of another token each."""
    ours, theirs = _by_id(own), _by_id(base)
    other = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    reserved = set(getattr(base, "added_tokens_decoder", {}))
    renamed = [f"{theirs[i]!r} is {ours[i]!r} (id {i})" for i in other if i in reserved]
    wrong = [f"id {i} is {ours[i]!r}, in the base's {theirs[i]!r}" for i in other if i not in reserved]
    if wrong:
        text = listing(f"The tokenizer in {folder} is not one of this base:", wrong, most=_SHOWN)
        if check:
            raise BaseMismatch(
                f"{text}\nGive the adapter's base, take the tokenizer's files out of the folder, or pass check_base=False "
                "(command line: --any-base) if you know that it fits."
            )
        log.warning("%s", text)
    if renamed:
        log.warning("The tokenizer in %s has other names for special tokens of the base: %s.", folder, _some(renamed))
    return [ours[i] for i in sorted(ours.keys() - theirs.keys())]


def _by_id(tokenizer: Any) -> Mapping[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _some(names: Iterable[str]) -> str:
    """The first of these, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - _SHOWN:,} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + rest


def copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and chat template of one folder into another."""
    for path in files_in(source):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def replace_files(source: Path, folder: Path) -> None:
    """Put the tokenizer and chat template of an adapter's folder into a model's, in place of what that has; a chat template alone
    into its tokenizer."""
    if _has_tokens(source):
        for path in files_in(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy_files(source, folder)
    elif (template := template_in(source)) is not None:
        own = open_tokenizer(folder)
        own.chat_template = template
        own.save_pretrained(folder)


NAME, _GENERATION_CONFIG = "generation_config.json", "config.json"


def stop_at(folder: Path, ends: Sequence[int]) -> None:
    """Let the model in `folder` stop at these tokens too, beside its own. A folder without the file gets one, with all that
    transformers would take from config.json instead. Raises FileError for files that are no JSON."""
    path = folder / NAME
    settings = _read(path) if path.is_file() else _of_config(folder)
    after = extended(settings.get("eos_token_id"), ends)
    if after != settings.get("eos_token_id"):
        text = json.dumps({**settings, "eos_token_id": after}, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _of_config(folder: Path) -> dict[str, Any]:
    """The model's own settings of generation; where it has a part for text, that part's."""
    from transformers import GenerationConfig

    config = _read(folder / _GENERATION_CONFIG) if (folder / _GENERATION_CONFIG).is_file() else {}
    parts = [part for key in ("decoder", "text_config") if isinstance(part := config.get(key), dict)]
    names = [name for name in vars(GenerationConfig()) if not name.startswith(("_", "output_", "transformers_"))]
    values = {name: next((c[name] for c in (config, *parts) if c.get(name) is not None), None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} holds no settings but {type(found).__name__}.")
    return found
