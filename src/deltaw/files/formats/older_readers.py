"""Settings beside merged weights by the names that older readers know.

transformers 5 writes rotary positions as `rope_parameters` and the precision as `dtype`. mlx-lm 0.32 reads `rope_theta` and
`rope_scaling`, and without them computes at its default base with no message; transformers 4 reads `torch_dtype`. Both spellings
are written where transformers reads the same settings from them as before. No model code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import FileError, first_line
from deltaw.files.formats import model_folder
from deltaw.files.formats.strict_json import read_object

log = logging.getLogger("deltaw")

Settings = dict[str, Any]

_ROPE, _THETA, _SCALING, _PARTIAL = "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"
# Model type → other names of rope_theta and partial_rotary_factor
_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
# Settings of two kinds of layers: model type → the names of rope_theta for layers of full and of sliding attention
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BY_LAYER = {"modernbert": ("global_rope_theta", "local_rope_theta")}
_BY_LAYER_DEFAULT = (_THETA, "rope_local_base_freq")


def add_older_settings(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write the settings in a model folder by their older names too.

    A setting that would change what transformers reads is left out, which is logged.

    Args:
        folder: a model folder whose files may be changed.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        FileError: for files that are no JSON.
    """
    if (path := folder / model_folder.CONFIG).is_file():
        config = read_object(path)
        older = older_config(config)
        if older != config and (why := _reason_against(config, older)):
            log.warning("%s stays as transformers 5 writes it: %s.", path.name, why)
        elif older != config:
            _write(path, older)
    if (path := folder / model_folder.TOKENIZER_CONFIG).is_file():
        _change_tokenizer(path, trust_remote_code)


def _change_tokenizer(path: Path, trust_remote_code: bool) -> None:
    """Write a tokenizer's settings as transformers 4 reads them, where the tokenizer stays the same one."""
    settings, folder = read_object(path), path.parent
    older = _older_tokenizer(settings, model_folder.template_in(folder))
    if older == settings:
        return
    try:
        before = model_folder.open_tokenizer(folder, trust_remote_code=trust_remote_code)
    except FileError:  # such a folder is merged as it is
        return
    _write(path, older)
    after = model_folder.open_tokenizer(folder, trust_remote_code=trust_remote_code)
    if others := model_folder.differences(after, before):
        _write(path, settings)
        log.warning("%s stays as transformers 5 writes it: older names would change %s.", path.name, ", ".join(others))


def _write(path: Path, settings: Settings) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- config.json ------------------------------------------------------------------------------------------------


def older_config(config: Mapping[str, Any]) -> Settings:
    """Return a config with its settings by older names too, also in the configs inside it.

    >>> older_config({"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})["rope_theta"]
    1000000.0
    """
    settings = {key: older_config(v) if isinstance(v, dict) and _is_config(v) else v for key, v in config.items()}
    added = _rope(settings, settings.get("model_type"))
    if isinstance(settings.get("dtype"), str):
        added["torch_dtype"] = settings["dtype"]
    return settings | {key: value for key, value in added.items() if key not in settings}


def _is_config(value: Mapping[str, Any]) -> bool:
    return "model_type" in value or _ROPE in value


def _rope(settings: Settings, model_type: object) -> Settings:
    """Return the rotary settings by older names; empty without any."""
    rope = settings.get(_ROPE)
    if not isinstance(rope, dict):
        return {}
    full, sliding = rope.get(_FULL), rope.get(_SLIDING)
    if isinstance(full, dict) and isinstance(sliding, dict):
        names = _BY_LAYER.get(str(model_type), _BY_LAYER_DEFAULT)
        thetas = zip(names, (full, sliding), strict=True)
        added = {name: part[_THETA] for name, part in thetas if _THETA in part}
        return added | ({_SCALING: scaling} if (scaling := _scaling(full)) else {})
    theta, partial = _NAMES.get(str(model_type), (_THETA, _PARTIAL))
    added = {older: rope[name] for older, name in ((theta, _THETA), (partial, _PARTIAL)) if name in rope}
    return added | ({_SCALING: scaling} if (scaling := _scaling(rope)) else {})


def _scaling(rope: Settings) -> Settings | None:
    """Return what older readers have as rope_scaling; None for plain rotary positions."""
    scaling = {key: value for key, value in rope.items() if key not in (_THETA, _PARTIAL)}
    return scaling if scaling.get("rope_type", "default") != "default" or len(scaling) > 1 else None


def _reason_against(before: Settings, after: Settings) -> str | None:
    """Say why transformers would read other settings after a change than before; None where it reads the same."""
    from transformers import CONFIG_MAPPING

    kind = str(before.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return f"transformers has no settings of the model type {kind!r} to compare with"
    try:
        one, other = (CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(c))).to_dict() for c in (before, after))
    except Exception as error:  # a config's class checks its values with errors of many kinds
        return f"with older names transformers does not read it ({first_line(error)})"
    differ = _differing(one, other)
    return f"older names would change {', '.join(differ)}" if differ else None


def _differing(before: Settings, after: Settings) -> list[str]:
    """Return the names of settings that are others after a change. Names that are new are none: no class has them."""
    names = []
    for name, value in before.items():
        other = after.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            names += [f"{name}.{inner}" for inner in _differing(value, other)]
        elif value != other:
            names.append(name)
    return names


# --- tokenizer_config.json --------------------------------------------------------------------------------------


def _older_tokenizer(settings: Settings, template: object) -> Settings:
    """Return a tokenizer's settings as transformers 4 reads them."""
    older = dict(settings)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(older.get("extra_special_tokens"), list) and "additional_special_tokens" not in older:
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if isinstance(template, str) and "chat_template" not in older:
        older["chat_template"] = template
    return older
