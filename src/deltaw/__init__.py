"""deltaw (ΔW): train, keep, switch, merge and exactly undo low-rank updates of pretrained models.

Names are imported when first used, so that `import deltaw` and the command line's help do not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deltaw.config import (
        CompareConfig,
        DataConfig,
        GenerateConfig,
        PlanConfig,
        RankConfig,
        SweepConfig,
        TrainConfig,
    )
    from deltaw.errors import DeltaWError
    from deltaw.files.compress import Compressed, Spectrum, compress, spectrum
    from deltaw.files.convert import convert
    from deltaw.files.merge import merge_files, unmerge_files
    from deltaw.files.store import load, save
    from deltaw.methods.bitfit import BitFit
    from deltaw.methods.bottleneck import Bottleneck
    from deltaw.methods.dora import DoRA
    from deltaw.methods.full import Full
    from deltaw.methods.ia3 import IA3
    from deltaw.methods.lora import LoRA
    from deltaw.methods.prefix import Prefix
    from deltaw.model.attach import attach, detach
    from deltaw.model.combine import combine
    from deltaw.model.extract import extract
    from deltaw.model.merging.merge import merge, unmerge
    from deltaw.model.merging.report import MergeReport
    from deltaw.model.summary import Summary, adapters, delta, parameters, summary
    from deltaw.model.switch import keep_on_device, route, use, using
    from deltaw.runs.compare import Comparison, compare
    from deltaw.runs.memory.plan import Planned, plan
    from deltaw.runs.rank import RankChoice, choose_rank
    from deltaw.runs.survey import Survey, survey
    from deltaw.runs.sweep import Sweep, sweep
    from deltaw.runs.train import RunResult, train

_HOME = {
    "DeltaWError": "errors",
    "CompareConfig": "config",
    "Comparison": "runs.compare",
    "Compressed": "files.compress",
    "DataConfig": "config",
    "GenerateConfig": "config",
    "PlanConfig": "config",
    "RankConfig": "config",
    "SweepConfig": "config",
    "TrainConfig": "config",
    "BitFit": "methods.bitfit",
    "Bottleneck": "methods.bottleneck",
    "DoRA": "methods.dora",
    "Full": "methods.full",
    "IA3": "methods.ia3",
    "LoRA": "methods.lora",
    "Prefix": "methods.prefix",
    "MergeReport": "model.merging.report",
    "Planned": "runs.memory.plan",
    "RankChoice": "runs.rank",
    "RunResult": "runs.train",
    "Spectrum": "files.compress",
    "Summary": "model.summary",
    "Survey": "runs.survey",
    "Sweep": "runs.sweep",
    "adapters": "model.summary",
    "attach": "model.attach",
    "choose_rank": "runs.rank",
    "combine": "model.combine",
    "compare": "runs.compare",
    "compress": "files.compress",
    "convert": "files.convert",
    "delta": "model.summary",
    "detach": "model.attach",
    "extract": "model.extract",
    "keep_on_device": "model.switch",
    "load": "files.store",
    "merge": "model.merging.merge",
    "merge_files": "files.merge",
    "parameters": "model.summary",
    "plan": "runs.memory.plan",
    "route": "model.switch",
    "save": "files.store",
    "spectrum": "files.compress",
    "summary": "model.summary",
    "survey": "runs.survey",
    "sweep": "runs.sweep",
    "train": "runs.train",
    "unmerge": "model.merging.merge",
    "unmerge_files": "files.merge",
    "use": "model.switch",
    "using": "model.switch",
}

__all__ = [
    "IA3",
    "BitFit",
    "Bottleneck",
    "CompareConfig",
    "Comparison",
    "Compressed",
    "DataConfig",
    "DeltaWError",
    "DoRA",
    "Full",
    "GenerateConfig",
    "LoRA",
    "MergeReport",
    "PlanConfig",
    "Planned",
    "Prefix",
    "RankChoice",
    "RankConfig",
    "RunResult",
    "Spectrum",
    "Summary",
    "Survey",
    "Sweep",
    "SweepConfig",
    "TrainConfig",
    "__version__",
    "adapters",
    "attach",
    "choose_rank",
    "combine",
    "compare",
    "compress",
    "convert",
    "delta",
    "detach",
    "extract",
    "keep_on_device",
    "load",
    "merge",
    "merge_files",
    "parameters",
    "plan",
    "route",
    "save",
    "spectrum",
    "summary",
    "survey",
    "sweep",
    "train",
    "unmerge",
    "unmerge_files",
    "use",
    "using",
]


_DRAWN = {"choose_rank", "compare", "merge_files", "sweep", "train"}
"""Functions that show what they do. The command line's views draw it: no other part prints."""


def _view(subject: str) -> Any:
    return importlib.import_module("deltaw.cli.live").view(subject)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    if name in _DRAWN:
        importlib.import_module("deltaw.progress").draw_with(_view)
    value = getattr(importlib.import_module(f"deltaw.{_HOME[name]}"), name)
    if isinstance(value, type):
        from deltaw.methods.documented import document

        document(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


# --- pickles of version 0.1 and before, which name modules that have moved -------------------------------------------

_MOVED = {
    "attached": ("model.record",),
    "checksums": ("layers.ops.checksums",),
    "inserted": ("methods.updates.bottleneck",),
    "lowrank": ("layers.ops.merging",),
    "originals": ("layers.ops.undo",),
    "passes": ("model.passes",),
    "prefixes": ("methods.updates.prefix",),
    "residency": ("layers.ops.residency",),
    "residual": ("layers.ops.residual",),
    "routes": ("layers.routing",),
    "scaled": ("methods.updates.ia3", "methods.updates.bitfit"),
    "slots": ("layers.patch",),
    "ties": ("layers.ties",),
    "updates": ("methods.updates.lowrank", "methods.updates.dora", "methods.updates.whole"),
    "weights": ("methods.updates.weights",),
}
"""Module that a pickle names → those where its classes are now."""


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module's classes where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == "deltaw" and name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        for home in _MOVED[module.__name__.rpartition(".")[2]]:
            vars(module).update(
                {n: v for n, v in vars(importlib.import_module(f"deltaw.{home}")).items() if n[:2] != "__"}
            )


sys.meta_path.append(_Moved())
