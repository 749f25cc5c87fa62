"""A request to resume a run, and the rest of the run, which is as it was begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.config import TrainConfig, from_mapping, keys, read_yaml
from deltaw.data.sources import Source
from deltaw.errors import ConfigError
from deltaw.methods.plan import Method
from deltaw.methods.registry import method_class
from deltaw.runs.resume.identity import check_changeable
from deltaw.runs.resume.place import RunFolder
from deltaw.training.prepare import Model

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Begun:
    """A run as it is to go on."""

    model: Model
    data: Source
    config: TrainConfig
    """Its `overwrite` is as the run was begun: the adapter's file tells it."""
    method: Method
    overwrite: bool
    """True if a run in another folder may be replaced."""


@dataclass(frozen=True)
class Asked:
    """A run to resume, and what it is to have else than it was begun with; None for what is as it was."""

    folder: Path
    model: Model | None
    data: Source | None
    config: TrainConfig | None
    method: Method | None
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None
    resume_with: tuple[str, ...]

    def settled(self, there: RunFolder) -> Begun:
        """Return all of the run as it is to go on, from what is asked for and the run's config.yaml.

        Raises ConfigError where there is no run, for what no run can be resumed with, and for a model or records that were in
        memory and are not given.
        """
        check_changeable(self.resume_with)
        settings: Mapping[str, Any] = read_yaml(settings_file(there.path))
        # Whether the model's code may run, and a folder be replaced, is for the caller to say, and not for a file
        of_file = set(keys(TrainConfig)) & settings.keys() - {"trust_remote_code", "overwrite"}
        known = {key: settings[key] for key in of_file}
        config = self.config or from_mapping(TrainConfig, known, where=str(there.config))
        if "out" not in self.resume_with:
            if self.config is not None and Path(config.out).resolve() != self.folder.resolve():
                raise ConfigError(
                    f"out is {config.out}, and the run to resume is in {self.folder}: give no other out, or say that it may "
                    "change (resume_with: out)."
                )
            was = str(settings.get("out", ""))
            # As it was written, where that is this folder: the adapter's file tells it
            same = was and Path(was).resolve() == self.folder.resolve()
            config = replace(config, out=was if same else str(self.folder))
        overwrite, config = config.overwrite, replace(config, overwrite=bool(settings.get("overwrite")))
        model, data = self._named("model", self.model, settings), self._named("data", self.data, settings)
        return Begun(model, data, config, self._method(settings, there), overwrite)

    def _named(self, what: str, asked: Any, settings: Mapping[str, Any]) -> Any:
        name = str(settings.get(what, ""))
        if asked is None and (not name or name.startswith("<")):
            raise ConfigError(
                f"The run in {self.folder} was trained with a {what} in memory. Resume it in Python, with the same {what}: "
                f"deltaw.train(model, data, resume={str(self.folder)!r})"
            )
        return name if asked is None else asked

    def _method(self, settings: Mapping[str, Any], there: RunFolder) -> Method:
        if self.method is not None:
            return self.method
        cls = method_class(str(settings.get("method", "lora")))
        method: Method = from_mapping(
            cls, {k: settings[k] for k in keys(cls) if k in settings}, where=str(there.config)
        )
        return method


def settings_file(run: str | Path) -> Path:
    """Return the file with a run's settings. Raises ConfigError where there is no run."""
    config = RunFolder(Path(run)).latest.config
    if not config.is_file():
        raise ConfigError(f"{run} holds no run that could be resumed: {config.name} is not in it.")
    return config
