"""The generation_config.json of a model folder: at which tokens its model stops. No model code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import FileError
from deltaw.model.ends import extended

NAME, _CONFIG = "generation_config.json", "config.json"


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

    config = _read(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
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
