"""The folder of a finished run, or of a study of many that goes on where it stopped. Knows files; no models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.config import TrainConfig, from_mapping, keys, to_mapping
from deltaw.errors import ConfigError, FileError
from deltaw.files import store
from deltaw.files.compress import triples_of
from deltaw.files.formats import peft
from deltaw.files.formats.atomic import write_text
from deltaw.files.formats.peft import LoRAFile
from deltaw.layers.ops.svd import Triples
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.training.opening import of_adapter


@dataclass(frozen=True)
class Finished:
    """A run, or an adapter of which the run is not there."""

    path: Path
    """As it was given."""
    adapter: Path
    file: LoRAFile
    triples: Mapping[str, Triples]
    """Layer name → the singular triples of its ΔW."""
    settings: Mapping[str, Any]
    """Those of config.yaml, which the adapter has too; none of a foreign adapter's."""

    @property
    def folder(self) -> Path:
        """Where more about it can be written."""
        return self.path if self.path != self.adapter else self.path.parent

    @property
    def rank(self) -> int:
        """Of the layer that has the largest."""
        return max(self.file.rank(layer) for layer in self.file.factors)

    def named(self, key: str) -> str | None:
        """The model or the data by name; None where they were objects in memory, or the file does not say."""
        found = self.settings.get(key)
        return found if isinstance(found, str) and found and not found.startswith("<") else None

    def config(self) -> TrainConfig:
        """As it was trained."""
        known = {k: self.settings[k] for k in keys(TrainConfig) if k in self.settings}
        config = from_mapping(TrainConfig, known, where=str(self.adapter))
        return config if self.settings else TrainConfig(data=of_adapter(self.adapter))

    def method(self) -> LoRA:
        """As it was trained. Raises ConfigError for an adapter that does not say."""
        kind = DoRA if self.settings.get("method") == "dora" else LoRA
        if "targets" not in self.settings:
            raise ConfigError(f"{self.adapter} does not say how it was trained: it is not of a run of deltaw.")
        known = {k: self.settings[k] for k in keys(kind) if k in self.settings}
        return from_mapping(kind, known, where=str(self.adapter))


def finished(path: str | Path) -> Finished:
    """The run or adapter in this folder. Raises FileError where there is none, or one that has no rank."""
    path = Path(path)
    adapter = next((p for p in (path / "adapter", path) if (p / peft.CONFIG).is_file()), None)
    if adapter is None:
        raise FileError(f"{path} is neither a run's folder, which has an adapter in it, nor an adapter's.")
    other = peft.method_of(adapter)
    if other is not None:
        raise FileError(f"{adapter} was trained by another method than LoRA ({other}): it has no A and B, and no rank.")
    file = peft.read(adapter)
    return Finished(path, adapter, file, triples_of(file, adapter), store.training_of(adapter))


def parameters_of(file: LoRAFile) -> int:
    """Trained values in the file."""
    factors = sum(A.numel() + B.numel() for A, B in file.factors.values())
    others = (*file.magnitudes.values(), *file.biases.values(), *file.whole.values())
    return factors + sum(t.numel() for t in others) + sum(values.numel() for _, values in file.rows.values())


def run_settings(config: TrainConfig) -> dict[str, Any]:
    """Those that all runs of a study share."""
    return {k: v for k, v in to_mapping(config).items() if k not in ("out", "overwrite", "lr", "valid")}


def claim(folder: Path, name: str, own: Mapping[str, Any], *, overwrite: bool) -> None:
    """Go on with a study whose settings, in the file `name`, are `own`, or begin one. `own["run"]` are settings of each run.
    Raises ConfigError where something else is in the folder, unless `overwrite` may replace it."""
    path, kind = folder / name, name.partition(".")[0]
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out is {folder}, which is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        known = read_json(path)
        begun = known is None or (folder / "runs").exists()
        if known != own and begun and not overwrite:
            raise ConfigError(
                f"The folder {folder} holds "
                + (f"a {kind} with other settings ({', '.join(_differing(known, own))})" if known else "something else")
                + ". Choose another --out, or pass --overwrite to replace it."
            )
        if known != own:
            shutil.rmtree(folder)
    write_text(path, json.dumps(own, indent=1, ensure_ascii=False) + "\n")


def _differing(known: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    other = sorted(k for k in own["run"] if known["run"].get(k) != own["run"][k])
    return other + sorted(k for k in own if k != "run" and known.get(k) != own[k])


def read_json(path: Path) -> Any:
    """None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
