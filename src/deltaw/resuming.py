"""The folder of a study of many runs: one of the same settings is gone on with. Knows folders; nothing of what a study does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.config import TrainConfig, to_mapping
from deltaw.errors import ConfigError
from deltaw.files.formats.atomic import write_text


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
