"""`deltaw merge`: an ordinary model folder out of a base and an adapter, on disk where the base is a checkpoint in
safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Merge
from deltaw.errors import ConfigError
from deltaw.files import units

# Bytes of a checkpoint up to which merged logits are compared unasked: loading twice that takes seconds
_SMALL = 2e9


@dataclass
class _Done:
    """What there is to show."""

    report: Any
    bytes: int
    correction: int = 0
    compared: Any = None


def run(command: Merge) -> None:
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    done = _merge(command, out)
    show.out.print(_table(done.report, command.all_layers))
    lines = [f"\nMerged model: {out}  {units.size(done.bytes)}"]
    if done.correction:
        lines.append(
            f"Correction file: {units.size(done.correction)} ({done.correction / done.bytes:.1%}). The base's own bytes come "
            f"back by: deltaw unmerge {out} {command.adapter} -o FOLDER"
        )
    if done.compared is None:
        lines.append("Not loaded and compared with the unmerged model (--check on does that).")
    else:
        lines.append(
            f"Checked by loading it: largest logit difference from the unmerged model {done.compared.drift:.2e}, "
            f"the same top token at {done.compared.agreement:.1%} of {done.compared.positions} positions."
        )
    show.out.print("\n".join(lines), soft_wrap=True)


def new_folder(name: str, overwrite: bool) -> Path:
    """Raises ConfigError for one that is there, unless it may be replaced."""
    out = Path(name)
    if out.exists() and not (overwrite and out.is_dir()):
        raise ConfigError(f"{out} is there already. Choose another --out, or pass --overwrite to replace it.")
    return out


def _merge(command: Merge, out: Path) -> _Done:
    from deltaw.files.formats.locate import NotByFiles

    folder = _checkpoint(command)
    if folder is not None:
        try:
            return _on_disk(command, folder, out)
        except NotByFiles as error:
            if command.reversible:
                raise NotByFiles(f"{error}\nWithout --reversible this is merged in memory.") from error
            show.err.print("By the checkpoint's files alone this cannot be merged: merging in memory.", style="dim")
    elif command.reversible:
        raise ConfigError(
            "--reversible gives a file's own bytes back, so it needs a checkpoint in safetensors and --dtype auto."
        )
    from deltaw.runs.export import merge_to_folder

    made = merge_to_folder(
        command.model,
        Path(command.adapter),
        out,
        dtype=command.dtype,
        check_base=not command.any_base,
        untie=command.untie,
    )
    return _Done(made.report, made.bytes, compared=made.compared)


def _checkpoint(command: Merge) -> Path | None:
    """The folder of safetensors that can be merged as it lies; None where a model has to be opened."""
    from deltaw.files.formats.safetensors import INDEX, SINGLE
    from deltaw.model.pretrained import is_hub_id, snapshot

    if command.dtype != "auto":
        return None
    folder = snapshot(command.model) if is_hub_id(command.model) else Path(command.model).expanduser()
    return folder if (folder / SINGLE).is_file() or (folder / INDEX).is_file() else None


def _on_disk(command: Merge, base: Path, out: Path) -> _Done:
    from deltaw.files.merge import merge_files
    from deltaw.model.merging.report import MergeReport

    done = _Done(None, 0)
    adapter = Path(command.adapter)

    def look(folder: Path) -> None:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if command.check == "on" or (command.check == "auto" and size <= _SMALL):
            from deltaw.runs.export import compare

            done.compared = compare(str(base), adapter, folder, check_base=not command.any_base)

    made = merge_files(
        base,
        adapter,
        out,
        reversible=command.reversible,
        check_base=not command.any_base,
        untie=command.untie,
        look=look,
    )
    done.report, done.bytes, done.correction = MergeReport((adapter.name,), made.layers), made.bytes, made.correction
    return done


def _table(report: Any, all_layers: bool) -> Any:
    from deltaw.model.merging.report import MergeReport
    from deltaw.runs.reports.train import MERGE_COLUMNS, merge_cells

    made = show.table(*MERGE_COLUMNS, title="Merge report")
    alone = [MergeReport(report.adapters, {name: stats}).row(name) for name, stats in report.layers.items()]
    for row in [*alone, report.row("all")] if all_layers else report.rows():
        made.add_row(*merge_cells(row))
    return made
