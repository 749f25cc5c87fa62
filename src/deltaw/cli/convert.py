"""`deltaw convert`: adapters of other formats into a folder for deltaw and PEFT, and such a folder into a file for them."""

from __future__ import annotations

from pathlib import Path

from deltaw.cli import show
from deltaw.cli.flags import Convert
from deltaw.cli.merge import new_folder
from deltaw.errors import ConfigError
from deltaw.files import units
from deltaw.layers.names import in_order


def run(command: Convert) -> None:
    """Run the command."""
    show.quiet_libraries()
    out = Path(command.out)
    to_file = out.suffix == ".gguf" or (
        Path(command.source).is_dir() and out.suffix in (".pt", ".bin", ".ckpt", ".pth")
    )
    if not to_file:
        new_folder(command.out, command.overwrite)
    elif out.is_dir() or (out.exists() and not command.overwrite):
        raise ConfigError(f"{out} is there already. Choose another --out, or pass --overwrite to replace a file.")
    from deltaw.files.convert import alpha_for_loralib, convert
    from deltaw.files.formats.peft import read

    parts = [part.strip() for part in (command.parts or "").split(",") if part.strip()]
    convert(
        command.source,
        out,
        alpha=command.alpha,
        parts=parts,
        base=command.base,
        trust_remote_code=command.trust_remote_code,
    )
    if to_file:
        whose = "llama.cpp" if out.suffix == ".gguf" else "loralib"
        show.out.print(f"Adapter for {whose}: {out}  {units.size(out.stat().st_size)}", soft_wrap=True)
        if whose == "loralib":
            alpha = alpha_for_loralib(read(Path(command.source))) if command.alpha is None else command.alpha
            show.out.print(f"The file does not contain α: create its layers with lora_alpha={alpha:g}.")
        return
    file = read(out)
    ranks = sorted({A.shape[0] for A, _ in file.factors.values()})
    whole = sorted({name.rpartition(".")[0] for name in file.whole})
    besides = f", and {len(whole)} modules' parameters whole: {', '.join(in_order(whole))}" if whole else ""
    show.out.print(
        f"Adapter: {out}  ({len(file.factors)} layers, rank {', '.join(map(str, ranks))}{besides})", soft_wrap=True
    )
