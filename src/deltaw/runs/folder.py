"""The folder of a run: where everything in it lies, and what a finished one holds. Knows files; no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaw.config import TrainConfig, from_mapping, keys
from deltaw.errors import ConfigError, FileError
from deltaw.files import store
from deltaw.files.compress import triples_of
from deltaw.files.formats import peft
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.formats.strict_json import read_object
from deltaw.layers.ops.svd import Triples
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.runs.results import JsonObject
from deltaw.runs.resume.place import RunFolder
from deltaw.training.opening import of_adapter


@dataclass(frozen=True)
class Finished:
    """A finished run, or an adapter without its run."""

    path: Path
    """The folder as it was named."""
    adapter: Path
    file: LoRAFile
    triples: Mapping[str, Triples]
    """Layer name → the singular triples of its ΔW."""
    settings: Mapping[str, object]
    """The run's settings, which the adapter keeps too; none where others wrote the adapter."""

    @property
    def folder(self) -> Path:
        """The folder for what is written about it."""
        return self.path if self.path != self.adapter else self.path.parent

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(self.file.rank(layer) for layer in self.file.factors)

    def named(self, key: str) -> str | None:
        """Return a setting that names the model or the data; None for objects in memory, or where there is no such setting."""
        name = self.settings.get(key)
        return name if isinstance(name, str) and name and not name.startswith("<") else None

    def config(self) -> TrainConfig:
        """Return the settings of training."""
        known = {k: self.settings[k] for k in keys(TrainConfig) if k in self.settings}
        config = from_mapping(TrainConfig, known, where=str(self.adapter))
        return config if self.settings else TrainConfig(data=of_adapter(self.adapter))

    def method(self) -> LoRA:
        """Return the settings of its method. Raises ConfigError for an adapter that does not say them."""
        kind = DoRA if self.settings.get("method") == "dora" else LoRA
        if "targets" not in self.settings:
            raise ConfigError(f"{self.adapter} does not say how it was trained: it is not of a run of deltaw.")
        known = {k: self.settings[k] for k in keys(kind) if k in self.settings}
        return from_mapping(kind, known, where=str(self.adapter))


def finished(path: str | Path) -> Finished:
    """Return the run or adapter in a folder. Raises FileError where there is none, or one without a rank."""
    path = Path(path)
    adapter = next((p for p in (RunFolder(path).adapter, path) if (p / peft.CONFIG).is_file()), None)
    if adapter is None:
        raise FileError(f"{path} is neither a run's folder, which has an adapter in it, nor an adapter's.")
    other = peft.method_of(adapter)
    if other is not None:
        raise FileError(f"{adapter} was trained by another method than LoRA ({other}): it has no A and B, and no rank.")
    file = peft.read(adapter)
    return Finished(path, adapter, file, triples_of(file, adapter), store.training_of(adapter))


def parameters_of(file: LoRAFile) -> int:
    """Return the number of trained values in the file."""
    factors = sum(A.numel() + B.numel() for A, B in file.factors.values())
    others = (*file.magnitudes.values(), *file.biases.values(), *file.whole.values())
    return factors + sum(t.numel() for t in others) + sum(values.numel() for _, values in file.rows.values())


def read_json(path: Path) -> JsonObject | None:
    """Return the object in a JSON file; None where there is no file. Raises FileError for another content."""
    return read_object(path) if path.is_file() else None
