"""A converted adapter's place: what may be replaced there, and the PEFT folder with the key for where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import peft
from deltaw.files.formats.others import Foreign
from deltaw.files.formats.peft import LoRAFile, config_for
from deltaw.files.formats.peft.card import public_name
from deltaw.files.formats.peft.metadata import BASE_PLACE

ORIGIN = "deltaw_converted_from"
"""Key of a converted adapter's metadata: the format that it came from."""


def check_is_adapter(dst: Path, read: Callable[[], object]) -> None:
    """Raise ConfigError where a file would be replaced that is no adapter: a model's weights have the same endings."""
    if not dst.is_file():
        return
    try:
        read()
    except FileError as error:
        raise ConfigError(
            f"{dst} is not replaced, since it holds no adapter. Choose another place. ({error})"
        ) from error


def as_folder(adapter: Foreign, dst: Path, base: str | Path | nn.Module | None) -> Path:
    """Write another program's adapter as a PEFT folder."""
    # A negative α, as of an adapter that is to be subtracted, has no form in PEFT
    scales = {layer: abs(scale) for layer, scale in adapter.scales.items()}
    factors = {n: (A, -B if adapter.scales[n] < 0 else B) for n, (A, B) in adapter.factors.items()}
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    named = str(base) if isinstance(base, str | Path) else adapter.base
    place = {BASE_PLACE: named} if named and Path(named).is_dir() else {}
    metadata = {ORIGIN: adapter.origin} | place | ({peft.ENDS: json.dumps(list(adapter.ends))} if adapter.ends else {})
    config = config_for(
        ranks, scales, target_modules=sorted(factors), dropout=adapter.dropout, base=public_name(named),
        task=adapter.task, use_dora=bool(adapter.magnitudes),
    )  # fmt: skip
    file = LoRAFile(
        factors, scales, config, metadata, embeddings=frozenset(adapter.embeddings), kernels=adapter.kernels,
        magnitudes=adapter.magnitudes,
    )  # fmt: skip
    return peft.write(dst, file)
