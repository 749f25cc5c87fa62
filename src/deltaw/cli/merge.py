"""`deltaw merge`: an ordinary model folder from a base and an adapter, on disk if the base is in safetensors."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Merge
from deltaw.errors import ConfigError
from deltaw.files import units

if TYPE_CHECKING:
    from rich.table import Table

    from deltaw.model.merging.report import MergeReport
    from deltaw.runs.export import Compared


@dataclass(frozen=True)
class _Merged:
    """A merged model folder."""

    report: MergeReport
    bytes: int
    correction: int = 0
    """Bytes of the correction file; 0 without one."""
    compared: Compared | None = None
    """None where the merged model was not loaded."""


def run(command: Merge) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.cli import live

    out = new_folder(command.out, command.overwrite)
    with live.view("merge"):
        merged = _merge(command, out)
    show.out.print(_table(merged.report, command.all_layers))
    lines = [f"\nMerged model: {out}  {units.size(merged.bytes)}"]
    if merged.correction:
        lines.append(
            f"Correction file: {units.size(merged.correction)} ({merged.correction / merged.bytes:.1%}). To restore the base's "
            f"bytes: deltaw unmerge {shlex.quote(str(out))} {shlex.quote(command.adapter)} -o FOLDER"
        )
    if merged.compared is None:
        lines.append("Not loaded and compared with the unmerged model (--check on does that).")
    else:
        lines.append(
            f"Checked by loading it: largest logit difference from the unmerged model {merged.compared.drift:.2e}, "
            f"the same top token at {merged.compared.agreement:.1%} of {merged.compared.positions} positions."
        )
    show.out.print("\n".join(lines), soft_wrap=True)
    show.system_of(command.adapter)


def new_folder(name: str, overwrite: bool) -> Path:
    """Return the folder of this name. Raises ConfigError for one that is there, unless it may be replaced."""
    out = Path(name)
    if out.exists() and not (overwrite and out.is_dir()):
        raise ConfigError(f"{out} is there already. Choose another --out, or pass --overwrite to replace it.")
    return out


def _merge(command: Merge, out: Path) -> _Merged:
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
            "--reversible restores a file's bytes, so it needs a checkpoint in safetensors and --dtype auto."
        )
    from deltaw.runs.export import merge_to_folder

    merged = merge_to_folder(
        command.model,
        Path(command.adapter),
        out,
        dtype=command.dtype,
        check_base=not command.any_base,
        untie=command.untie,
        check=command.check,
        trust_remote_code=command.trust_remote_code,
    )
    return _Merged(merged.report, merged.bytes, compared=merged.compared)


def _checkpoint(command: Merge) -> Path | None:
    """The folder of safetensors to merge on disk; None where a model has to be opened."""
    from deltaw.files.formats.safetensors import INDEX, SINGLE
    from deltaw.model.pretrained import is_hub_id, snapshot

    if command.dtype != "auto":
        return None
    folder = snapshot(command.model) if is_hub_id(command.model) else Path(command.model).expanduser()
    return folder if (folder / SINGLE).is_file() or (folder / INDEX).is_file() else None


def _on_disk(command: Merge, base: Path, out: Path) -> _Merged:
    from deltaw.files.merge import merge_files
    from deltaw.model.merging.report import MergeReport
    from deltaw.runs.export import compare, is_checked

    adapter = Path(command.adapter)
    comparisons: list[Compared] = []

    def look(folder: Path) -> None:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if is_checked(command.check, size):
            check_base, trust = not command.any_base, command.trust_remote_code
            comparisons.append(compare(str(base), adapter, folder, check_base=check_base, trust_remote_code=trust))

    merged = merge_files(
        base,
        adapter,
        out,
        reversible=command.reversible,
        check_base=not command.any_base,
        untie=command.untie,
        look=look,
        trust_remote_code=command.trust_remote_code,
    )
    report = MergeReport((adapter.name,), merged.layers)
    return _Merged(report, merged.bytes, merged.correction, comparisons[0] if comparisons else None)


def _table(report: MergeReport, all_layers: bool) -> Table:
    from deltaw.model.merging.report import MergeReport
    from deltaw.runs.reports.train import MERGE_COLUMNS, merge_cells

    table = show.table(*MERGE_COLUMNS, title="Merge report")
    alone = [MergeReport(report.adapters, {name: stats}).row(name) for name, stats in report.layers.items()]
    for row in [*alone, report.row("all")] if all_layers else report.rows():
        table.add_row(*merge_cells(row))
    return table
