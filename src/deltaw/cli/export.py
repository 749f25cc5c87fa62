"""`deltaw export`: a merged model, or an adapter with its base, as a file for programs that serve it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Export
from deltaw.cli.merge import new_folder
from deltaw.errors import ConfigError, FileError, first_line
from deltaw.files import units

if TYPE_CHECKING:
    from deltaw.files.publish.gguf_model import Exported


def run(command: Export) -> None:
    """Run the command."""
    show.quiet_libraries()
    if Path(command.out).suffix == ".gguf":
        raise ConfigError(f"--out is {command.out}: it is a folder, in which model.gguf and a Modelfile are written.")
    out = new_folder(command.out, command.overwrite)
    exported = (
        _of_adapter(command, out) if (Path(command.source) / "adapter_config.json").is_file() else _of_model(command)
    )
    show.out.print(
        f"GGUF model: {exported.file}  {units.size(exported.bytes)}, {command.type}, {exported.tensors} tensors "
        f"of {exported.arch!r}",
        soft_wrap=True,
    )
    if exported.kept:
        show.out.print(
            f"In f16, since their rows have no whole blocks of 32: {', '.join(exported.kept)}", soft_wrap=True
        )
    show.out.print(f"llama.cpp: llama-cli -m {exported.file}\nOllama: cd {out} && ollama create NAME", soft_wrap=True)


def _of_model(command: Export) -> Exported:
    """Export a model folder."""
    from deltaw.files.publish.gguf_model import export_gguf

    source = Path(command.source)
    if source.is_dir() and not (source / "config.json").is_file():
        adapters = sorted(path.parent for path in source.glob("*/adapter_config.json"))
        hint = f" Adapters are in {', '.join(map(str, adapters))}: give one of these." if adapters else ""
        raise FileError(f"{source} is neither a model folder, which has a config.json, nor an adapter's.{hint}")
    if command.base is not None:
        raise ConfigError(f"--base is for adapters, and {command.source} is a model.")
    return export_gguf(command.source, command.out, kind=command.type, trust_remote_code=command.trust_remote_code)


def _of_adapter(command: Export, out: Path) -> Exported:
    """Merge an adapter into its base beside the output, export that, and remove it."""
    from deltaw.files.formats.atomic import check_apart
    from deltaw.files.formats.locate import NotByFiles
    from deltaw.files.formats.peft.config import read_config
    from deltaw.files.formats.peft.metadata import base_in
    from deltaw.files.merge import merge_files
    from deltaw.files.publish.gguf_model import export_gguf, exportable
    from deltaw.files.store import read
    from deltaw.model.pretrained import is_hub_id, snapshot
    from deltaw.training.opening import of_adapter

    named = read_config(Path(command.source)).base_model_name_or_path
    base = command.base or base_in(read(Path(command.source)).metadata, named)
    if not base:
        known = f"names its base as {named}, which is not here" if named else "does not name its base"
        raise ConfigError(f"{command.source} {known}: give it with --base.")
    folder = snapshot(base) if is_hub_id(base) else Path(base).expanduser()
    check_apart(out, {"the adapter": command.source, "the base": folder})
    exportable(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        merged = Path(place) / "merged"
        try:
            merge_files(folder, command.source, merged, trust_remote_code=command.trust_remote_code)
        except NotByFiles as error:
            raise FileError(
                first_line(error),
                error.problems,
                f"Merge it first: deltaw merge {base} {command.source} -o MERGED. Then export MERGED.",
            ) from error
        system = of_adapter(command.source).system
        return export_gguf(merged, out, kind=command.type, system=system, trust_remote_code=command.trust_remote_code)
