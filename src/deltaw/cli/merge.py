"""`deltaw merge`: an ordinary model folder out of a base and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Merge
from deltaw.errors import ConfigError


def run(command: Merge) -> None:
    show.quiet_libraries()
    out = Path(command.out)
    if out.exists() and not (command.overwrite and out.is_dir()):
        raise ConfigError(f"{out} is there already. Choose another --out, or pass --overwrite to replace it.")
    from deltaw.study.merging import merge_to_folder

    merged = merge_to_folder(
        command.model, Path(command.adapter), out, dtype=command.dtype, device=command.device,
        check_base=not command.any_base,
    )  # fmt: skip
    show.out.print(_table(merged.report, command.all_layers))
    show.out.print(
        f"\nMerged model: {out}  {units.size(merged.bytes)}\n"
        f"Checked by loading it: largest logit difference from the unmerged model {merged.drift:.2e}, "
        f"the same top token at {merged.agreement:.1%} of {merged.positions} positions.",
        soft_wrap=True,
    )


def _table(report: Any, all_layers: bool) -> Any:
    from deltaw.merged import MergeReport
    from deltaw.study.run_report import MERGE_COLUMNS, merge_cells

    made = show.table(*MERGE_COLUMNS, title="Merge report")
    alone = [MergeReport(report.adapters, {name: stats}).row(name) for name, stats in report.layers.items()]
    for row in [*alone, report.row("all")] if all_layers else report.rows():
        made.add_row(*merge_cells(row))
    return made
