"""The smallest model of a folder of transformers that builds and takes a batch."""

from __future__ import annotations

import copy
import importlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.errors import DeltaWError
from deltaw.layers.kinds import Weight
from deltaw.methods.targets import select
from tests.conformance.configs import CUTS, small
from tests.conformance.inputs import Batch, batches, with_places
from tests.conformance.settings import CLASSES, SETTINGS, WITHOUT

MOST = 30_000_000
"""Parameters that a model may have."""
SECONDS = 12
"""Of processor time for the tries to build it."""
# The classes of a folder in the order in which they are tried
ORDER = (
    r".*ForConditionalGeneration", r".*ForCausalLM", r".*ForMaskedLM", r".*LMHead\w*", r".*ForImageClassification",
    r".*ForSequenceClassification", r".*ForCTC", r".*ForSpeechSeq2Seq|.*ForRNNT|.*ForTDT", r".*ForAudioClassification",
    r".*ForVideoClassification", r".*For(Object|Keypoint)Detection", r".*For(Semantic|Universal|Instance|Image)Segmentation|.*ForSegmentation",
    r".*ForDepthEstimation", r".*ForPreTraining|.*ForMaskedImageModeling", r".*For\w+", r".*Model", r".*",
)  # fmt: skip


class NotBuilt(Exception):
    """No class of the folder could be built and called."""


@dataclass
class Built:
    """A model and a batch that it takes."""

    model: Any
    batch: Batch
    cut: str
    tried: list[str] = field(default_factory=list)
    """Why what was tried before did not do."""


def folders() -> list[str]:
    """The model folders of the installed transformers."""
    root = Path(transformers.__file__).parent / "models"
    return sorted(
        p.name for p in root.iterdir() if p.name not in ("auto", "deprecated") and any(p.glob("modeling_*.py"))
    )


def classes(folder: str) -> list[type[PreTrainedModel]]:
    """Models of a folder, those with a head first."""
    root = Path(transformers.__file__).parent / "models" / folder
    found: list[type[PreTrainedModel]] = []
    for path in sorted(root.glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{folder}.{path.stem}")
        found += [
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == module.__name__
            and c.config_class is not None and not c.__name__.endswith("PreTrainedModel") and not c.__name__.startswith("_")
        ]  # fmt: skip
    ranked = sorted(found, key=lambda c: next(i for i, p in enumerate(ORDER) if re.fullmatch(p, c.__name__)))
    named = CLASSES.get(folder)
    return [c for c in found if c.__name__ == named] if named else ranked


def build(folder: str) -> Built:
    """The first class of the folder with dense layers that can be built small and called. Raises NotBuilt."""
    tried: list[str] = []
    idle: Built | None = None
    """A model whose dense layers change no output."""
    began = time.process_time()
    for cls in classes(folder)[:6]:
        for alone in (False, True):
            for model, cut in _models(cls, folder, tried):
                batch = _taken(model, tried, cut, alone=alone)
                if batch is not None:
                    built = Built(model, batch, cut, tried)
                    if depends(built):
                        return built
                    idle = idle or built
                    break
                if time.process_time() - began > SECONDS:
                    raise NotBuilt("; ".join(dict.fromkeys(tried)))
    if idle is not None:
        return idle
    raise NotBuilt("; ".join(dict.fromkeys(tried)) or "it has no model class")


@torch.no_grad()
def depends(built: Built) -> bool:
    """Whether an output changes with the weights of the layers that `all-linear` adapts."""
    model = copy.deepcopy(built.model)
    try:
        layers = select(model, "all-linear", 2).layers
    except DeltaWError:  # it has none
        return False
    before = outputs(model, built.batch)
    for layer in layers.values():
        (layer.value if isinstance(layer, Weight) else layer.weight).mul_(-0.7)
    after = outputs(model, built.batch)
    pairs = zip(before, after, strict=False)
    return any(a.shape != b.shape or bool(((a - b).abs() > 0).any()) for a, b in pairs)


def _models(cls: Any, folder: str, tried: list[str]) -> Iterator[tuple[Any, str]]:
    for name, cut in CUTS.items():
        try:
            config = small(cls.config_class(), cut, SETTINGS.get(folder, {}))
            for part in WITHOUT.get(folder, ()):
                setattr(config, part, None)
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if count > MOST:
                tried.append(f"{cls.__name__} {name}: {count:,} parameters")
                continue
            torch.manual_seed(7)
            model = cls(config).eval()
        except Exception as error:  # a size that does not fit another
            tried.append(f"{cls.__name__} {name}: {said(error)}")
            continue
        randomised(model)
        yield model, name


def said(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 5) -> None:
    """Weights that hide nothing: no factor, gate or matrix of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(0.1 * draw.to(parameter.dtype))
        else:
            inputs = parameter.shape[-1] if "expert" in name else parameter[0].numel()
            parameter.copy_(draw / inputs**0.5)


def _taken(model: Any, tried: list[str], cut: str, *, alone: bool) -> Batch | None:
    """The first batch that the model takes; `alone`: texts without the images or sounds that it may have beside them."""
    for batch in batches(model, alone=alone):
        current: Batch | None = batch
        for _ in range(3):
            assert current is not None
            try:
                if sum(t.numel() for t in outputs(model, current)):
                    return current
                tried.append(f"{type(model).__name__} {cut}: no output")
                break
            except Exception as error:
                tried.append(f"{type(model).__name__} {cut} {shapes(current)}: {said(error)}")
                current = with_places(model, current, str(error))
                if current is None:
                    break
    return None


def shapes(batch: Batch) -> str:
    return ", ".join(f"{n} {list(v.shape)}" if isinstance(v, Tensor) else n for n, v in batch.items())


@torch.no_grad()
def outputs(model: Any, batch: Batch) -> list[Tensor]:
    return tensors(called(model, batch))


def called(model: Any, batch: Batch) -> Any:
    torch.manual_seed(11)  # some draw noise
    return model(**batch)


def tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """All floating-point tensors of an output, in order; caches aside."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [
            t
            for n, v in value.items()
            if n not in ("cache", "past_key_values", "cache_params", "attentions")
            for t in tensors(v)
        ]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []
