"""deltaw (ΔW): train, keep, switch, merge and exactly undo low-rank updates of pretrained models.

Names are imported when first used, so that `import deltaw` and the command line's help do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deltaw.version import __version__

if TYPE_CHECKING:
    from deltaw.attached import (
        Summary,
        adapters,
        attach,
        delta,
        detach,
        parameters,
        summary,
        use,
        using,
    )
    from deltaw.config import DataConfig, GenerateConfig, TrainConfig
    from deltaw.errors import DeltaWError
    from deltaw.merged import MergeReport, merge, unmerge
    from deltaw.methods.lora import LoRA
    from deltaw.run import RunResult, train
    from deltaw.store import load, save

_HOME = {
    "DeltaWError": "errors",
    "DataConfig": "config",
    "GenerateConfig": "config",
    "TrainConfig": "config",
    "LoRA": "methods.lora",
    "MergeReport": "merged",
    "RunResult": "run",
    "Summary": "attached",
    "adapters": "attached",
    "attach": "attached",
    "delta": "attached",
    "detach": "attached",
    "load": "store",
    "merge": "merged",
    "parameters": "attached",
    "save": "store",
    "summary": "attached",
    "train": "run",
    "unmerge": "merged",
    "use": "attached",
    "using": "attached",
}

__all__ = [
    "DataConfig",
    "DeltaWError",
    "GenerateConfig",
    "LoRA",
    "MergeReport",
    "RunResult",
    "Summary",
    "TrainConfig",
    "__version__",
    "adapters",
    "attach",
    "delta",
    "detach",
    "load",
    "merge",
    "parameters",
    "save",
    "summary",
    "train",
    "unmerge",
    "use",
    "using",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"deltaw.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
