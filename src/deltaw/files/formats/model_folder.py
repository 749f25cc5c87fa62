"""Files beside the weights of a model or an adapter: config, tokenizer, chat template, end tokens. No model code.

A tokenizer in an adapter's folder is used where it is another one than the base's.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

from deltaw.errors import BaseMismatch, FileError, first_line, listing, needs_its_code
from deltaw.files.formats.atomic import check_apart, check_replaceable, files_written
from deltaw.files.formats.strict_json import read_object
from deltaw.model.ends import extended

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("deltaw")

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
# Files that hold tokens, as transformers' tokenizers name them; any of the first makes a tokenizer with the others
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "vocab.bpe", "tiktoken.model", "tekken.json", "source.spm", "bpe.codes",
)  # fmt: skip
_BESIDE = (
    TOKENIZER_CONFIG, TEMPLATE, "chat_template.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "target.spm",
    "target_vocab.json", "normalizer.json", "dict.txt",
)  # fmt: skip
TOKENIZER_FILES = (*_VOCABULARIES, *_BESIDE, _MORE_TEMPLATES)
"""Names in a folder that belong to its tokenizer or chat template."""
# Sections of tokenizer.json that hold how it was last used, not what it is
_STATE = ("padding", "truncation")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SHOWN = 5


def config_of(folder: Path) -> dict[str, object] | None:
    """Return the settings in a model folder's config.json; None where there is none that can be read."""
    try:
        return read_object(folder / CONFIG)
    except FileError:
        return None


def check_place(out: Path, inputs: Mapping[str, object]) -> None:
    """Raise ConfigError where no merged model can be written to `out`.

    It is apart from the inputs (what it is → its path), and holds nothing, or what a merge wrote.
    """
    check_apart(out, inputs)

    def others(folder: Path) -> set[str] | None:
        written = files_written(folder)
        return None if written is None else {path.name for path in folder.iterdir()} - written

    check_replaceable(out, "a merged model that deltaw wrote", others)


# --- tokenizers -------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    """Return the files and folders of a tokenizer or chat template in a folder."""
    return [path for name in TOKENIZER_FILES if (path := folder / name).exists()]


def contents(folder: Path) -> dict[str, bytes]:
    """Return name in the folder → content, of a tokenizer's files."""
    inside = (path.rglob("*") if path.is_dir() else [path] for path in files_in(folder))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for paths in inside for p in paths if p.is_file()}


def open_tokenizer(
    source: str | Path, *, trust_remote_code: bool = False, **arguments: object
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id. `arguments` go to transformers.

    Raises FileError, also for a tokenizer that needs code of its own, without `trust_remote_code`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=trust_remote_code, **arguments
        )
    except Exception as error:
        expected = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
        if not (trust_remote_code or isinstance(error, expected)):  # its own code may raise any
            raise
        refused = None if trust_remote_code else needs_its_code(f"The tokenizer in {source}", error)
        if refused is not None:
            raise refused from error
        reason = first_line(error)
        raise FileError(
            f"The tokenizer in {source} cannot be opened: {reason}\nBeside an adapter: without its files the base's is used."
        ) from error
    return tokenizer


def brought(
    folder: Path,
    base: PreTrainedTokenizerBase | None,
    *,
    config: PretrainedConfig | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that an adapter's folder has, where it is another one than the base's, and log what differs.

    A folder that has a chat template alone gives the base's tokenizer with it.

    Args:
        folder: the adapter's.
        base: the base's tokenizer, if it has one.
        config: the model's.
        check: refuse a tokenizer that gives the ids of the base's ordinary tokens to other ones.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        FileError: for a tokenizer that cannot be opened.
        BaseMismatch: for one that is not one of this base, with `check`; else that is logged.
    """
    if not files_in(folder):
        return None
    if not _has_tokens(folder):
        tokenizer = _with_template(folder, base)
        if (folder / "added_tokens.json").is_file():
            log.warning("%s has added tokens, but no vocabulary that these were added to: they are left out.", folder)
        if tokenizer is not None:
            log.warning("The chat template is the one in %s; the base has another one, or none.", folder)
        return tokenizer
    arguments = {} if config is None else {"config": config}
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code, **arguments)
    if base is None:
        log.warning("The tokenizer is the one in %s; the base has none.", folder)
        return tokenizer
    new = _check_ids(folder, tokenizer, base, check)
    others = differences(tokenizer, base)
    if not others:
        return None
    added = f"; new: {_some(new)}" if new else ""
    log.warning("The tokenizer is the one in %s. Other than in the base's: %s%s.", folder, " and ".join(others), added)
    return tokenizer


def _with_template(folder: Path, base: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Return the base's tokenizer with the folder's chat template, where that is another one."""
    template = template_in(folder)
    if template is None or base is None or template == getattr(base, "chat_template", None):
        return None
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = template
    return tokenizer


def template_in(folder: Path) -> str | dict[str, str] | None:
    """Return a folder's chat template: a text, or several by their names. Raises FileError for files that cannot be read."""
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        for name in ("chat_template.json", TOKENIZER_CONFIG):
            if (folder / name).is_file():
                template = read_object(folder / name).get("chat_template")
                if isinstance(template, list):
                    return {entry["name"]: entry["template"] for entry in template}
                if template:
                    return str(template)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"The chat template in {folder} cannot be read: {error!r}") from error
    return None


def differences(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> list[str]:
    """Return which of "tokens", "special tokens" and "chat template" are others in a tokenizer than in `base`."""
    others = []
    if _tokens(tokenizer) != _tokens(base):
        others.append("tokens")
    if any(str(getattr(tokenizer, name, None)) != str(getattr(base, name, None)) for name in _SPECIAL):
        others.append("special tokens")
    if getattr(tokenizer, "chat_template", None) != getattr(base, "chat_template", None):
        others.append("chat template")
    return others


def differs(source: PreTrainedTokenizerBase | Path, base: str | None) -> bool:
    """Return whether a tokenizer, or a folder's, is another one than that of the base of this name.

    True where one of them cannot be opened.
    """
    try:
        of_base = open_tokenizer(base, local_files_only=True) if base else None
        tokenizer: PreTrainedTokenizerBase | None
        if isinstance(source, Path):
            tokenizer = open_tokenizer(source) if _has_tokens(source) else _with_template(source, of_base)
        else:
            tokenizer = source
        return of_base is None or (tokenizer is not None and bool(differences(tokenizer, of_base)))
    except FileError:
        return True


def has_vocabulary(tokenizer: PreTrainedTokenizerBase | BaseImageProcessor) -> TypeGuard[PreTrainedTokenizerBase]:
    """Return whether it is a tokenizer; an image processor has no vocabulary."""
    return hasattr(tokenizer, "get_vocab")


def _has_tokens(folder: Path) -> bool:
    """Return whether a folder has a tokenizer, and not a chat template alone."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, object]:
    """Return what decides which tokens a text becomes.

    Of a fast tokenizer that is all of tokenizer.json but its state, of others the vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in _STATE}


def _check_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, check: bool
) -> list[str]:
    """Return the tokens that the base's tokenizer has no ids for. Raises BaseMismatch for ids of another token each."""
    here, of_base = _by_id(tokenizer), _by_id(base)
    other = [i for i in sorted(here.keys() & of_base.keys()) if here[i] != of_base[i]]
    reserved = set(getattr(base, "added_tokens_decoder", {}))
    renamed = [f"{of_base[i]!r} is {here[i]!r} (id {i})" for i in other if i in reserved]
    wrong = [f"id {i} is {here[i]!r}, in the base's {of_base[i]!r}" for i in other if i not in reserved]
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
    return [here[i] for i in sorted(here.keys() - of_base.keys())]


def _by_id(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _some(names: Iterable[str]) -> str:
    """Return the first of these names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - _SHOWN:,} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + rest


def copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and chat template of one folder into another."""
    for path in files_in(source):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def replace_files(source: Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Put the tokenizer and chat template of an adapter's folder into a model's, in place of those that it has.

    A chat template alone goes into the model's tokenizer.
    """
    if _has_tokens(source):
        for path in files_in(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy_files(source, folder)
    elif (template := template_in(source)) is not None:
        tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)


# --- end tokens -------------------------------------------------------------------------------------------------


def stop_at(folder: Path, ends: Sequence[int]) -> None:
    """Let the model in `folder` stop at these tokens too, beside its own.

    A folder without generation_config.json gets one, with all that transformers would take from config.json instead.

    Raises:
        FileError: for files that are no JSON.
    """
    path = folder / GENERATION_CONFIG
    settings = read_object(path) if path.is_file() else _of_config(folder)
    before = cast("int | list[int] | None", settings.get("eos_token_id"))
    after = extended(before, ends)
    if after != before:
        text = json.dumps({**settings, "eos_token_id": after}, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _of_config(folder: Path) -> dict[str, object]:
    """Return the settings of generation in a model's config.json; where it has a part for text, that part's."""
    from transformers import GenerationConfig

    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    parts = [part for key in ("decoder", "text_config") if isinstance(part := config.get(key), dict)]
    known = GenerationConfig.from_dict({}).to_dict()
    names = [name for name in known if not name.startswith(("_", "output_", "transformers_"))]
    values = {name: next((c[name] for c in (config, *parts) if c.get(name) is not None), None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
