"""`deltaw convert`: adapters of other programs into a folder for deltaw and PEFT, and such a folder for other programs."""

from __future__ import annotations

from pathlib import Path

from deltaw.cli import show
from deltaw.cli.flags import Convert
from deltaw.cli.merge import new_folder
from deltaw.errors import ConfigError
from deltaw.files import units
from deltaw.layers.names import in_order

_FILES = (".gguf", ".onnx_adapter")
_PROGRAMS = {"gguf": "llama.cpp", "onnx_adapter": "ONNX Runtime", "loralib": "loralib"}


def run(command: Convert) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.files.convert import convert, target_of

    out = Path(command.out)
    to = None if command.to == "auto" else command.to
    # What is made of another program's file is a folder, whatever its name
    target = (
        "peft" if to is None and Path(command.source).is_file() and out.suffix not in _FILES else target_of(out, to)
    )
    if target not in _PROGRAMS:
        new_folder(command.out, command.overwrite)
    elif out.is_dir() or (out.exists() and not command.overwrite):
        raise ConfigError(f"{out} is there already. Choose another --out, or pass --overwrite to replace a file.")
    parts = [part.strip() for part in (command.parts or "").split(",") if part.strip()]
    convert(
        command.source,
        out,
        to=target,
        alpha=command.alpha,
        parts=parts,
        base=command.base,
        trust_remote_code=command.trust_remote_code,
    )
    _say(command, out, target)


def _say(command: Convert, out: Path, target: str) -> None:
    """Print what was written."""
    from deltaw.files.convert import alpha_for_loralib
    from deltaw.files.formats.peft import read

    if target in _PROGRAMS or target == "mlx-lm":
        show.system_of(command.source)
    if target in _PROGRAMS:
        show.out.print(f"Adapter for {_PROGRAMS[target]}: {out}  {units.size(out.stat().st_size)}", soft_wrap=True)
        if target == "loralib":
            alpha = alpha_for_loralib(read(Path(command.source))) if command.alpha is None else command.alpha
            show.out.print(f"The file does not contain α: create its layers with lora_alpha={alpha:.12g}.")
        if target == "onnx_adapter":
            show.out.print(
                "Its names are Olive's: <layer>.lora_A.weight. The ONNX model must have inputs of these names."
            )
        return
    if target == "mlx-lm":
        show.out.print(f"Adapter for mlx-lm: {out}  (mlx_lm.generate --adapter-path {out})", soft_wrap=True)
        return
    file = read(out)
    ranks = sorted({A.shape[0] for A, _ in file.factors.values()})
    whole = sorted({name.rpartition(".")[0] for name in file.whole})
    besides = f", and {len(whole)} modules' parameters whole: {', '.join(in_order(whole))}" if whole else ""
    show.out.print(
        f"Adapter: {out}  ({len(file.factors)} layers, rank {', '.join(map(str, ranks))}{besides})", soft_wrap=True
    )
