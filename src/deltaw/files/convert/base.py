"""The base of an adapter as far as a conversion asks: its config, and the names and shapes of its layers. No weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltaw.errors import FileError, first_line, needs_its_code
from deltaw.files.formats import loralib

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def base_config(base: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a model folder or hub id. Raises FileError."""
    from transformers import AutoConfig

    path = Path(base).expanduser()
    # The hub is not asked for what looks like a path
    if not path.exists() and (str(base).startswith((".", "/", "~")) or str(base).count("/") > 1):
        raise FileError(f"There is no model at {base}.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        message = f"{base} has no config that can be read: {first_line(error)}"
        raise needs_its_code(base, error) or FileError(message) from error
    return config


def layers_of(base: str | Path | nn.Module, trust_remote_code: bool) -> loralib.Layers:
    """Return what is known of a base's layers."""
    model = base if isinstance(base, nn.Module) else without_weights(base, trust_remote_code=trust_remote_code)
    weights = {n: (m, w) for n, m in model.named_modules() if (w := m._parameters.get("weight")) is not None}
    embeddings = frozenset(n for n, (m, _) in weights.items() if isinstance(m, nn.Embedding))
    shapes = {
        n: tuple(w.shape)[::-1] if type(m).__name__ == "Conv1D" else tuple(w.shape) for n, (m, w) in weights.items()
    }
    return loralib.Layers(shapes, embeddings)


def without_weights(base: str | Path, *, causal: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that a config describes, as a causal one or by its own class; no weight is read. Raises FileError."""
    import transformers

    config = base_config(base, trust_remote_code)
    named = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        # The config may name anything in transformers; only a class of models is called
        if not causal and isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            model: nn.Module = named(config)
            return model
        try:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise needs_its_code(base, error) or FileError(f"{base} cannot be built: {first_line(error)}") from error
        return model
