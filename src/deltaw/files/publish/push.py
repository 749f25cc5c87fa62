"""An adapter folder → a repository on the hub: checked whole first, then in one commit."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save

from deltaw.errors import ConfigError, FileError, first_line
from deltaw.files import store
from deltaw.files.formats import model_folder, peft
from deltaw.files.formats.peft import card
from deltaw.files.formats.peft.config import CONFIG, WEIGHTS, PeftConfig, read_config
from deltaw.files.formats.peft.metadata import BASE_PLACE, TRAINING, sealed
from deltaw.files.formats.strict_json import parse_object, read_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("deltaw")

_LOG_IN = (
    "Log in with `hf auth login`, or set HF_TOKEN to a token that may write (from the hub's settings, Access Tokens)."
)


@dataclass(frozen=True)
class Package:
    """The files that go to the hub."""

    files: dict[str, Path | bytes]
    """Name in the repository → the file here, or its content where it is another one there."""
    left: list[str]
    """Names in the folder that stay here, since they are none of an adapter's."""
    base: str | None
    """The base's name in the settings that go out."""

    def sizes(self) -> dict[str, int]:
        """Return name → bytes."""
        return {
            name: len(source) if isinstance(source, bytes) else source.stat().st_size
            for name, source in self.files.items()
        }


def package(adapter: str | Path, *, base: str | None = None) -> Package:
    """Check that a folder is a whole adapter, and return what of it goes to the hub.

    Paths of this machine do not go out: their last parts stand for them in the settings of the adapter and of its training.

    Args:
        adapter: the adapter's folder.
        base: the base's id on the hub, in place of the one in the settings.

    Raises:
        FileError: for a folder that holds no adapter, one that is damaged, and weights in a pickle.
        ConfigError: for a `base` that is no id on the hub.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> folder = deltaw.save(deltaw.attach(model, deltaw.LoRA(rank=4)), "to-push")
    >>> sorted(package(folder, base="org/model").files)
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(adapter)
    if base is not None and card.hub_id(base) is None:
        raise ConfigError(f"--base is {base!r}; it must be the base's id on the hub, such as org/model.")
    config, file = read_config(folder), store.read(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileError(
            f"{folder} has its weights in a pickle alone, which runs code where it is opened: it is not pushed. Load and save "
            f"the adapter, which writes {WEIGHTS}."
        )
    if isinstance(file, peft.LoRAFile) and not file.changes_anything:
        log.warning("The adapter in %s changes nothing: B is zero in all of its layers.", folder)
    named = base or card.public_name(config.base_model_name_or_path)
    files: dict[str, Path | bytes] = {CONFIG: folder / CONFIG, WEIGHTS: _weights(folder)}
    if named != config.base_model_name_or_path:
        settings = {**read_object(folder / CONFIG), "base_model_name_or_path": named}
        files[CONFIG] = (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    files[card.NAME] = _card(folder, config, file.metadata, base)
    for path in model_folder.files_in(folder):
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files |= {p.relative_to(folder).as_posix(): p for p in inside}
    known = {name.split("/")[0] for name in files}
    return Package(files, sorted(p.name for p in folder.iterdir() if p.name not in known), named)


def check_repo(repo: str) -> None:
    """Raise ConfigError for what is no OWNER/NAME that the hub has a form for."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository; it is OWNER/NAME. ({first_line(error)})") from error


def push(api: HfApi, packed: Package, repo: str, *, private: bool = False) -> str:
    """Put a package into a repository on the hub, which is made where there is none. Return its address.

    Args:
        api: the hub's client.
        packed: the files.
        repo: the repository's id.
        private: make it private. A public one that is there already is refused.

    Raises:
        ConfigError: for an id that the hub has no form for, and for a public repository with `private`.
        FileError: without a token, permission or network, and where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd

    with _one_message(repo):
        # None leaves the choice to the hub, as an organisation has set it
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repo_id).private:
            raise ConfigError(
                f"{address.repo_id} is there already and is public: nothing was pushed. Make it private in its settings on the "
                "hub, or name another repository."
            )
        operations = [CommitOperationAdd(name, source) for name, source in packed.files.items()]
        api.create_commit(address.repo_id, operations, commit_message="Adapter, pushed by deltaw")
    return str(address)


def client() -> HfApi:
    """Return the hub's client, at HF_ENDPOINT where that is set. Raises FileError where nobody is logged in."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise FileError(f"There is no token for the hub. {_LOG_IN}")
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _weights(folder: Path) -> Path | bytes:
    """Return the file of the tensors, or its content where the settings of its training have paths of this machine."""
    with safe_open(folder / WEIGHTS, "pt") as file:  # type: ignore[no-untyped-call]
        metadata: dict[str, str] = file.metadata() or {}
        training = parse_object(metadata.get(TRAINING, "{}"))
        public = _without_path(training)
        if public == training and BASE_PLACE not in metadata:
            return folder / WEIGHTS
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata.pop(BASE_PLACE, None)
    if training:
        metadata[TRAINING] = json.dumps(public, sort_keys=True, ensure_ascii=False)
    return save(tensors, sealed(tensors, metadata))


def _without_path(value: object) -> object:
    """Return the last part of a path from the root, also inside lists and groups; any other setting as it is."""
    if isinstance(value, list):
        return [_without_path(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _without_path(inner) for key, inner in value.items()}
    if isinstance(value, str) and (PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(PurePath(value).name).name
    return value


def _card(folder: Path, config: PeftConfig, metadata: dict[str, str], base: str | None) -> Path | bytes:
    """Return the folder's card, or a new one where it has none, or one without the base's id that nobody has edited."""
    path = folder / card.NAME
    if not card.is_ours(path) or (path.is_file() and base is None):
        return path
    scores = card.scores_in(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dataclasses.replace(card.card_of(config, metadata), base=base, scores=scores).text().encode()


@contextmanager
def _one_message(repo: str) -> Iterator[None]:
    """Turn the hub's errors into one message each."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository; it is OWNER/NAME. ({first_line(error)})") from error
    except LocalTokenNotFoundError as error:
        raise FileError(f"There is no token for the hub. {_LOG_IN}") from error
    except HfHubHTTPError as error:
        raise FileError(_refused(repo, error)) from error
    except Exception as error:
        # The client's library of HTTP is another one in its versions, each with errors of its own
        if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise FileError(
                f"The hub cannot be reached: {first_line(error) or type(error).__name__}. All files go in one commit, so none "
                f"or all of them are in {repo}. Push again when there is a network."
            ) from error
        raise


def _refused(repo: str, error: Exception) -> str:
    """Return the message for an answer of the hub that is an error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"The hub does not know the token. {_LOG_IN}"
    if status == 403:
        return f"There is no permission to write to {repo}: the token may only read, or the owner is another one."
    if status == 404:
        return f"{repo} is not there for this token, or its owner is not."
    return f"The hub refused {repo} ({status}): {first_line(error)}"
