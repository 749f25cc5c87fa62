"""`deltaw convert`: adapters of other formats into a folder that deltaw and PEFT read, and such a folder into llama.cpp's
file."""

from __future__ import annotations

from pathlib import Path

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Convert
from deltaw.cli.merge import new_folder
from deltaw.errors import ConfigError


def run(command: Convert) -> None:
    show.quiet_libraries()
    out = Path(command.out)
    if out.suffix != ".gguf":
        new_folder(command.out, command.overwrite)
    elif out.is_dir() or (out.exists() and not command.overwrite):
        raise ConfigError(f"{out} is there already. Choose another --out, or pass --overwrite to replace a file.")
    from deltaw.converted import convert
    from deltaw.files.peft import read

    parts = [part.strip() for part in (command.parts or "").split(",") if part.strip()]
    convert(command.source, out, alpha=command.alpha, parts=parts, base=command.base)
    if out.suffix == ".gguf":
        show.out.print(f"Adapter for llama.cpp: {out}  {units.size(out.stat().st_size)}", soft_wrap=True)
        return
    factors = read(out).factors
    ranks = sorted({A.shape[0] for A, _ in factors.values()})
    show.out.print(f"Adapter: {out}  ({len(factors)} layers, rank {', '.join(map(str, ranks))})", soft_wrap=True)
