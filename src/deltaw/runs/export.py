"""Merged model folders: what is on disk is loaded again and compared with the unmerged model, where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from deltaw.config import DataConfig, DType
from deltaw.errors import MergeError
from deltaw.files.formats import model_folder
from deltaw.files.formats.atomic import replacing_folder, sign
from deltaw.files.formats.older_readers import add_older_settings
from deltaw.model.merging import merge
from deltaw.model.merging.report import MergeReport
from deltaw.model.pretrained import Pretrained, save_pretrained
from deltaw.progress import say
from deltaw.training import opening

# Rounding of a merged weight moves logits by about the dtype's precision; far beyond it something is wrong
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_NAMES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


Check = Literal["auto", "on", "off"]
"""The answers to whether a merged model is loaded again and compared."""
# Bytes of a checkpoint whose merged logits are compared unasked: loading it twice takes seconds
_SMALL = 2e9


def is_checked(check: Check, size: int) -> bool:
    """Return whether a merged model of so many bytes is loaded again and compared.

    >>> is_checked("auto", 1_000), is_checked("off", 1_000), is_checked("on", 10**12)
    (True, False, True)
    """
    return check == "on" or (check == "auto" and size <= _SMALL)


@dataclass(frozen=True)
class Compared:
    """The logits of a merged folder's model beside those of base + branch, in the same dtype."""

    drift: float
    """The largest difference of a logit."""
    agreement: float
    """Share of positions whose likeliest token, or class, is the same."""
    positions: int
    """Tokens, or records of a classifier, that were compared."""


@dataclass(frozen=True)
class MergedFolder:
    """A model folder that was written."""

    report: MergeReport
    bytes: int
    """The size of all its files."""
    compared: Compared | None
    """Its model, loaded again, beside the unmerged one; None where that was not asked for."""


def merge_to_folder(
    source: str,
    adapter: Path,
    out: Path,
    *,
    dtype: DType = "auto",
    check_base: bool = True,
    untie: bool = False,
    check: Check = "auto",
    trust_remote_code: bool = False,
) -> MergedFolder:
    """Write base + ΔW as an ordinary model folder, through the model in memory.

    This is for checkpoints that are not in safetensors, and for another precision; files/merge.py merges on disk.

    Args:
        source: the base: a hub id, folder or GGUF file.
        adapter: the adapter's folder.
        out: the folder to write, atomically: after an error it is not there.
        dtype: the precision to store; auto is the checkpoint's.
        check_base: refuse an adapter of another base.
        untie: store tied weights apart where the adapter changes one of them.
        check: load what was written and compare its logits with the unmerged model's: always, never, or for small models.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        ConfigError: `out` is, holds or lies in the base or the adapter, or holds what no merge wrote.
        FileError: the base or the adapter cannot be read, or the model not be written.
        BaseMismatch: the adapter is of another base.
        MergeError: the merge could not be exact, or what is on disk is not what was merged.
    """
    model_folder.check_place(out, {"the base": source, "the adapter": adapter})
    loaded = _opened(source, adapter, dtype, check_base, trust_remote_code)
    data = opening.of_adapter(adapter)
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    before = _logits(loaded, data) if is_checked(check, size) else None
    say("merging")
    report = merge.merge(loaded.model, untie=untie)
    say("saving the merged model")
    with replacing_folder(out) as folder:
        merge.settle(loaded.model)
        save_pretrained(loaded.model, loaded.tokenizer, folder)
        add_older_settings(folder, trust_remote_code=trust_remote_code)
        compared = None
        if before is not None:
            compared = _compared(folder, data, *before, loaded.model.dtype, trust_remote_code)
        size = sum(f.stat().st_size for f in folder.iterdir())
        sign(folder)
    return MergedFolder(report, size, compared)


def compare(
    source: str, adapter: Path, folder: Path, *, check_base: bool = True, trust_remote_code: bool = False
) -> Compared:
    """Compare the merged model in `folder` with the unmerged one. Raises MergeError when they differ by more than rounding."""
    loaded = _opened(source, adapter, "auto", check_base, trust_remote_code)
    data = opening.of_adapter(adapter)
    inputs, expected = _logits(loaded, data)
    dtype = loaded.model.dtype
    del loaded  # the two models are not in memory together
    return _compared(folder, data, inputs, expected, dtype, trust_remote_code)


def _opened(source: str, adapter: Path, dtype: DType, check_base: bool, trust_remote_code: bool) -> Pretrained:
    """Return the base with the adapter on it, and with as many tokens as the adapter has."""
    stored = _checkpoint_dtype(source, trust_remote_code) if dtype == "auto" else dtype
    loaded = opening.opened(
        source, opening.of_adapter(adapter), dtype=stored, device="cpu", trust_remote_code=trust_remote_code
    )
    return opening.equip(loaded, adapter, check_base=check_base, resize=True)


@torch.no_grad()
def _logits(loaded: Pretrained, data: DataConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs that models are compared on, and the model's logits [batch, …, classes or tokens], fp32."""
    inputs = opening.probe(loaded, data)
    return inputs, loaded.model(**inputs).logits.float()


@torch.no_grad()
def _compared(
    folder: Path,
    data: DataConfig,
    inputs: dict[str, Tensor],
    expected: Tensor,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Compared:
    """Load the folder's model in this dtype and compare its logits with the expected ones."""
    say("checking the merged model")
    again = opening.opened(str(folder), data, dtype=_NAMES[dtype], device="cpu", trust_remote_code=trust_remote_code)
    logits = again.model(**inputs).logits.float()
    drift = float((logits - expected).abs().max())
    limit = _TOLERANCE.get(dtype, 1e-3) * max(1.0, float(expected.abs().max()))
    if not drift <= limit:
        raise MergeError(
            f"The merged model's logits differ by {drift:.3g} from the unmerged model's (limit {limit:.3g}): "
            "nothing was written."
        )
    agreement = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    return Compared(drift, agreement, logits[..., 0].numel())


def _checkpoint_dtype(source: str, trust_remote_code: bool) -> DType:
    """Return the precision that the checkpoint is stored in, which merging must not widen or narrow unasked."""
    from deltaw.model.pretrained import locate, read_config

    if "gguf_file" in locate(source):
        return "float32"
    dtype = read_config(source, trust_remote_code=trust_remote_code).dtype
    return _NAMES.get(dtype, "float32") if isinstance(dtype, torch.dtype) else "float32"
