"""Pictures in records → what a vision model takes. Knows the model's image processor; nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.forms import Record
from deltaw.data.sources import show
from deltaw.errors import DataError, FileError, first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from transformers import BaseImageProcessor


def pixels(records: Sequence[Record], processor: BaseImageProcessor) -> list[NDArray[np.float32]]:
    """Return each record's picture as the model's processor makes it, fp32 [channels, h, w].

    Raises one DataError with every picture that cannot be used.
    """
    pictures, problems = [], []
    for record in records:
        try:
            picture = opened(record.image)
            pictures.append(np.asarray(processor(picture, return_tensors="np")["pixel_values"][0], dtype=np.float32))
        except Exception as error:  # for damaged pictures the decoders raise dozens of types
            problems.append(f"{record.place}: {first_line(error)}")
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} records have a picture that cannot be used:", problems)
    return pictures


def opened(image: object) -> NDArray[np.generic]:
    """Return a picture as an array, uint8 [h, w, channels]; an array of floats stays as it is.

    image: an array, nested lists, a PIL image, the path of a file, or a mapping with a path or bytes. A grey picture gets three
    equal channels.

    Raises DataError for what is no picture, FileError where reading it needs a package that is not installed.
    """
    if isinstance(image, dict) and (image.get("bytes") or image.get("path")):  # as data sets keep them in parquet
        image = _decoded(image["bytes"]) if image.get("bytes") else image["path"]
    if isinstance(image, (str, Path)):
        image = _read(Path(image).expanduser())
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.dtype == object or 0 in array.shape:
        raise DataError(
            f"field 'image' must be a path, a PIL image, or an array [h, w] or [h, w, channels], found {show(image)}"
        )
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.uint8)


def _read(path: Path) -> Image | NDArray[np.generic]:
    if path.suffix == ".npy":
        array: NDArray[np.generic] = np.load(path, allow_pickle=False)
        return array
    if not path.is_file():
        raise DataError(f"there is no picture {path}")
    picture: Image = _pil().open(path)
    return picture


def _decoded(content: bytes) -> Image:
    import io

    picture: Image = _pil().open(io.BytesIO(content))
    return picture


def _pil() -> ModuleType:
    try:
        from PIL import Image as pil
    except ImportError as error:
        raise FileError(
            "Reading picture files needs a package that is not installed: pip install 'deltaw[vision]'"
        ) from error
    return pil
