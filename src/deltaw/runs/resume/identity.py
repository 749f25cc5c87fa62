"""The identity of a run, without which its state does not go on: settings, base and records. Knows what was prepared."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from deltaw import __version__
from deltaw.data import Example
from deltaw.data.items import Item
from deltaw.errors import ConfigError
from deltaw.files.formats.fingerprint import EXACT
from deltaw.files.identity import base_hash
from deltaw.layers.ops.checksums import octets
from deltaw.training.prepare import Prepared

CHANGEABLE = ("epochs", "steps", "minutes", "patience", "out")
"""Settings that a resumed run may have others of, where that is asked for."""
LENGTHS = ("epochs", "steps", "minutes", "patience")
"""Settings of which others make a finished run longer."""
# Names of things whose content is compared, and settings that decide no bit of the result
_NOT_COMPARED = (
    "model", "data", "valid", "out", "overwrite", "log_every", "samples", "samples_during", "save_every", "trust_remote_code",
    "start", "track",
)  # fmt: skip


def identity(prepared: Prepared, settings: Mapping[str, object], processes: int = 1) -> dict[str, Any]:
    """Return what is compared, as JSON holds it: settings, base, records, and the versions and devices that decide about bits.

    The adapter is not attached yet.
    """
    model = prepared.loaded.model
    return {
        "settings": json.loads(json.dumps({k: v for k, v in settings.items() if k not in _NOT_COMPARED})),
        "base": base_hash(model, EXACT),
        "records": records_hash(prepared.encoded.examples),
        "held_out": records_hash(prepared.valid.examples if prepared.valid else ()),
        "environment": {
            "deltaw": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": next(model.parameters()).device.type,
            "threads": torch.get_num_threads(),
            "processes": processes,
        },
    }


def records_hash(examples: Iterable[Example | Item]) -> str:
    """Return the sha256, in hex, over encoded records in their order."""
    hashed = hashlib.sha256()
    for example in examples:
        if isinstance(example, Example):
            parts: dict[str, Any] = {"input_ids": example.input_ids, "supervised": [*map(int, example.supervised)]}
        else:
            parts = {**example.inputs, "target": example.target}
        for name, value in sorted(parts.items()):
            content = _bytes(value)
            hashed.update(f"{name} {len(content)} ".encode() + content)
    return hashed.hexdigest()


def _bytes(value: object) -> bytes:
    if isinstance(value, Tensor):
        return str(tuple(value.shape)).encode() + octets(value.contiguous().reshape(-1)).tobytes()
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}".encode() + value.tobytes()
    if isinstance(value, list) and all(type(number) is int for number in value):
        return array("q", value).tobytes()
    return repr(value).encode()


def check_same(
    kept: Mapping[str, Any], now: Mapping[str, Any], folder: object, *, may_change: Collection[str], finished: bool
) -> list[str]:
    """Compare the identity of a state with that of the run that is to go on from it.

    Args:
        kept: the identity in the state.
        now: that of the run to come.
        folder: the run's, for messages.
        may_change: settings of which others are asked for.
        finished: whether the run had come to its end, and so may be made longer.

    Returns:
        Sentences on versions and devices that are others, with which the bits may be.

    Raises:
        ConfigError: with all that differs and may not.
    """
    problems = []
    before, after = kept["settings"], now["settings"]
    for key in sorted(before):  # a setting that the state lacks is one that its version did not have
        old, new = before[key], after.get(key)
        if old == new or key in may_change or (finished and key in LENGTHS):
            continue
        change = f"{key} was {old!r}, it is {new!r} now"
        problems.append(change + (f" (allowed with --resume-with {key})" if key in CHANGEABLE else ""))
    if kept["base"] != now["base"]:
        problems.append("the base's weights are others")
    problems += [f"the {words} are others" for key, words in _RECORDS.items() if kept[key] != now[key]]
    if problems:
        raise ConfigError(
            f"The run in {folder} cannot be resumed so:", problems, "Resume it as it was begun, or begin a new run."
        )
    there, here = kept["environment"], now["environment"]
    changes = [f"{key} {there[key]} then, {here[key]} now" for key in here if there.get(key, here[key]) != here[key]]
    return [f"The last bits may differ from those of a run without a break: {', '.join(changes)}."] if changes else []


_RECORDS = {"records": "training records", "held_out": "held-out records"}


def differing(there: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """Return a sentence for each tensor that an adapter has and a run lacks, or the other way round, or that differs in size."""
    problems = [f"{key}: not in the run" for key in there if key not in asked]
    problems += [f"{key}: not in the adapter" for key in asked if key not in there]
    both = (key for key in there if key in asked and there[key] != asked[key])
    return problems + [f"{key}: shape and scale {there[key]} in the adapter, {asked[key]} in the run" for key in both]


def check_changeable(keys: Collection[str]) -> None:
    """Raise ConfigError for keys that no resumed run may change."""
    if wrong := [key for key in keys if key not in CHANGEABLE]:
        problems = [f"{key} may not change" for key in wrong]
        raise ConfigError("--resume-with cannot be used so:", problems, f"It takes {', '.join(CHANGEABLE)}.")
