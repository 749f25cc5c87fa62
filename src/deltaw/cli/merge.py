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
    made = show.table("layer", "‖ΔW‖/‖W0‖", "ΔW kept", "entries changed", "largest change", title="Merge report")
    if all_layers:
        for name, s in report.layers.items():
            made.add_row(name, f"{s.relative:.2e}", f"{s.survived:.2%}", f"{s.changed:.1%}", f"{s.largest_change:.2e}")
    changed = sum(s.changed for s in report.layers.values()) / len(report.layers)
    made.add_row(
        f"all {len(report.layers)}", f"{report.relative:.2e}", f"{report.survived:.2%}", f"{changed:.1%}",
        f"{report.largest_change:.2e}",
    )  # fmt: skip
    return made
