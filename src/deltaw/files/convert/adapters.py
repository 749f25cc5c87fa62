"""`convert` itself: an adapter of one format in another, told apart by their names and contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from deltaw.errors import ConfigError, FileError, shown
from deltaw.files.convert import others
from deltaw.files.convert.base import layers_of
from deltaw.files.convert.gguf import from_gguf, to_gguf
from deltaw.files.convert.loralib import from_loralib, to_loralib
from deltaw.files.convert.places import as_folder
from deltaw.files.formats import loralib, peft
from deltaw.files.formats.atomic import check_apart
from deltaw.files.formats.others import Foreign, kohya, litgpt, mlx_lm, onnx_adapter, torchtune
from deltaw.files.formats.others.foreign import check_layers, read_any, refuse
from deltaw.files.formats.peft.config import CONFIG
from deltaw.layers.names import found_as

# Formats whose files have no α, or not always; and those that do not say of which parts or model they are
_WITHOUT_ALPHA, _WITH_PARTS = ("loralib", "torchtune", "litgpt"), ("loralib", "litgpt", "kohya")
_LORALIB = (".pt", ".bin", ".ckpt", ".pth")

FORMATS = {
    "peft": "a folder for deltaw and PEFT", "mlx-lm": "a folder for mlx-lm", "gguf": "a file for llama.cpp (.gguf)",
    "onnx_adapter": "a file for ONNX Runtime (.onnx_adapter)", "loralib": "a checkpoint for loralib (.bin, .pt)",
}  # fmt: skip
"""Formats that `convert` writes: name → the kind of file."""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    alpha: float | None = None,
    parts: Sequence[str] = (),
    base: str | Path | nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter in another format, atomically.

    It reads folders of PEFT (Unsloth's too) and of mlx-lm, llama.cpp's .gguf, ONNX Runtime's .onnx_adapter, kohya's and LyCORIS's
    .safetensors, litgpt's lit_model.pth.lora, torchtune's adapter_0.pt, and loralib's checkpoints (.pt, .bin, .ckpt, .pth). It
    writes those of FORMATS. One of both sides is PEFT's folder.

    Args:
        src: the adapter, a file or a folder.
        dst: what to write.
        to: the format to write (default: by the ending of `dst`; a folder is PEFT's).
        alpha: α of a file that has none: loralib's, torchtune's and litgpt's without their settings. (Default when writing for
            loralib: the adapter's.)
        parts: which of query, key and value the merged layers of a checkpoint have updates of, "q" and "v" for example, or
            "101", a digit a part. Of kohya's files with several models, which of these: "lora_unet" or "lora_te1".
        base: the model folder or hub id whose config says how layers are named: for GGUF, kohya's and torchtune's files. For the
            latter two and for loralib, also a model. With the other formats, layers and shapes are compared with its.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        `dst`.

    Raises:
        FileError: with everything wrong in the files; `dst` is then as it was.
        ConfigError: for settings that are missing, and for a `dst` that is, holds or lies in `src` or the base, or that holds
            something else than an adapter.

    >>> import torch, deltaw
    >>> torch.save({"q_proj.lora_A": torch.ones(2, 8), "q_proj.lora_B": torch.ones(8, 2)}, "loralib.pt")
    >>> folder = deltaw.convert("loralib.pt", "converted", alpha=4)
    >>> round(deltaw.spectrum(folder)["q_proj"].norm, 6)  # ‖ΔW‖, all of whose 64 entries are α/r·2 = 4
    32.0
    """
    src, dst = Path(src), Path(dst)
    check_apart(dst, {"the adapter": src, "the base": base})
    src, form = _source(src)
    # The folder that is made of another program's file may have any name
    target = "peft" if to in (None, "peft") and form != "peft" and dst.suffix in _LORALIB else target_of(dst, to)
    if form != "peft" and target != "peft":
        raise ConfigError(f"{src} is {form}'s; it becomes a folder first, and that becomes {target}'s: convert twice.")
    _check_used(src, form, target, alpha, parts)
    if form == "peft":
        return _from_peft(src, dst, target, alpha=alpha, base=base, trust_remote_code=trust_remote_code)
    if form == "gguf":
        return from_gguf(src, dst, base)
    if form == "loralib":
        layers = None if base is None else layers_of(base, trust_remote_code)
        return from_loralib(loralib.read(src, alpha=alpha, parts=parts, layers=layers), dst)
    adapter = others.read(src, form, alpha=alpha, parts=parts, base=base, trust_remote_code=trust_remote_code)
    return as_folder(adapter, dst, base)


def target_of(dst: Path, to: str | None) -> str:
    """Return the format to write. Raises ConfigError for a name that is none, and for one that `dst` does not end in."""
    by_name = {".gguf": "gguf", onnx_adapter.SUFFIX: "onnx_adapter", **dict.fromkeys(_LORALIB, "loralib")}.get(
        dst.suffix
    )
    if to is None:
        return by_name or "peft"
    if to not in FORMATS:
        raise ConfigError(f"{to!r} is no format to write; it must be one of {', '.join(FORMATS)}.")
    if by_name not in (None, to) or (by_name is None and to not in ("peft", "mlx-lm")):
        raise ConfigError(f"{dst} is no name for {FORMATS[to]}.")
    return to


def _check_used(src: Path, form: str, target: str, alpha: float | None, parts: Sequence[str]) -> None:
    """Raise ConfigError for an α or parts that would decide nothing."""
    problems = []
    if alpha is not None and form not in _WITHOUT_ALPHA and target != "loralib":
        problems.append(f"alpha is {alpha:g}: {src} is {form}'s and has its scales itself")
    if parts and form not in _WITH_PARTS:
        problems.append(f"parts is {', '.join(parts)}: {src} is {form}'s and names its layers itself")
    if problems:
        raise ConfigError("These settings have no use here; leave them out:", problems)


def _check_fits(src: Path, base: str | Path | nn.Module, trust_remote_code: bool) -> None:
    """Raise FileError with every layer of a PEFT folder that the base lacks, or has in another shape."""
    file, layers = peft.read(src), layers_of(base, trust_remote_code)
    names = {n: found_as(n, layers.shapes, {}) or n for n in file.factors if not file.is_stack(n)}
    adapter = Foreign(
        "peft", {name: file.factors[n] for n, name in names.items()}, embeddings={*layers.embeddings} & {*names.values()},
        kernels={names[n]: kernel for n, kernel in file.kernels.items()},
    )  # fmt: skip
    refuse(src, check_layers(layers, adapter))


def _from_peft(
    src: Path,
    dst: Path,
    target: str,
    *,
    alpha: float | None,
    base: str | Path | nn.Module | None,
    trust_remote_code: bool,
) -> Path:
    """Write a PEFT folder in another format, or again as a folder of deltaw's."""
    if target == "gguf":
        return to_gguf(src, dst, base)
    if base is not None:
        _check_fits(src, base, trust_remote_code)
    if target == "loralib":
        return to_loralib(src, dst, alpha)
    return peft.write(dst, peft.read(src)) if target == "peft" else others.write(src, dst, target, base)


def _source(src: Path) -> tuple[Path, str]:
    """Return the file or folder to read, and the format of what is in it. Raises FileError."""
    if src.is_dir():
        return _in_folder(src)
    if not src.is_file():
        raise FileError(
            f"There is no file {src} to convert. (A PEFT folder is converted to a .gguf or .onnx_adapter file, to loralib's .bin "
            "or .pt, or with to='mlx-lm' (command line: --to mlx-lm) to a folder.)"
        )
    if src.suffix in (".gguf", onnx_adapter.SUFFIX):
        return src, src.suffix.removeprefix(".")
    if src.name == mlx_lm.WEIGHTS:
        return src.parent, "mlx-lm"
    if src.suffix not in (*_LORALIB, ".safetensors", litgpt.SUFFIX):
        raise FileError(
            f"{src} is no adapter to convert by its name: loralib's end in .pt, .bin or .ckpt, llama.cpp's in .gguf, kohya's in "
            ".safetensors, litgpt's in .lora, ONNX Runtime's in .onnx_adapter."
        )
    keys = list(read_any(src)[0])
    if kohya.is_state(keys):
        return src, "kohya"
    if torchtune.is_state(keys):
        return src, "torchtune"
    if litgpt.is_state(keys):
        return src, "litgpt"
    if any(".lora_A." in key for key in keys):
        beside = (src.parent / CONFIG).is_file()
        raise FileError(
            f"{src} has PEFT's names: "
            + (
                "give its folder."
                if beside
                else f"its {CONFIG}, which has α, must lie beside it. Then give the folder."
            )
        )
    if src.suffix in _LORALIB:
        return src, "loralib"
    raise FileError(f"{src} has no names of kohya's or LyCORIS's. In it: {shown(sorted(keys), 5)}.")


def _in_folder(folder: Path) -> tuple[Path, str]:
    """Return the file or folder to read of a folder, and its format."""
    if mlx_lm.is_folder(folder):
        return folder, "mlx-lm"
    if (file := litgpt.file_in(folder)) is not None:
        return file, "litgpt"
    if not any((folder / name).is_file() for name in (peft.WEIGHTS, peft.PICKLED)):
        files = [*folder.glob("adapter*.pt"), *folder.glob("*" + litgpt.SUFFIX)]
        if len(files) > 1:
            names = ", ".join(sorted(path.name for path in files))
            raise FileError(f"{folder} holds several adapters: {names}. Give one of these files.")
        if files:
            return _source(files[0])
    return folder, "peft"
