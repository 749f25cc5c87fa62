"""`deltaw inspect`: what is in an adapter folder. Needs no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Inspect


def run(command: Inspect) -> None:
    show.quiet_libraries()
    from deltaw.files import peft

    folder = Path(command.adapter)
    file = peft.read(folder)
    rows = [_row(name, A, B, file.scales[name]) for name, (A, B) in file.factors.items()]
    size = sum(f.stat().st_size for f in folder.iterdir())
    if command.json:
        print(json.dumps({"layers": rows, "bytes": size, "config": file.config, "metadata": file.metadata}, indent=1))
        return
    facts = {
        "layers": f"{len(rows)}",
        "ranks": ", ".join(str(r) for r in sorted({row["rank"] for row in rows})),
        "parameters": f"{sum(row['parameters'] for row in rows):,}",
        "size": units.size(size),
        "base": str(file.config.get("base_model_name_or_path") or "not named"),
        "fingerprint of the base": file.metadata.get("deltaw_base", "none (not written by deltaw)"),
    }
    show.out.print(show.facts(facts))
    show.out.print()
    show.out.print(_table(rows if command.all_layers else _by_kind(rows)))


def _row(name: str, A: Any, B: Any, scale: float) -> dict[str, Any]:
    from deltaw.lowrank import delta_norm

    return {
        "layer": name, "shape": f"{B.shape[0]}×{A.shape[1]}", "rank": A.shape[0], "scale": scale,
        "parameters": A.numel() + B.numel(), "dtype": str(A.dtype).removeprefix("torch."),
        "A": float(A.double().norm()), "B": float(B.double().norm()), "dW": delta_norm(A, B, scale), "count": 1,
    }  # fmt: skip


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that differ only in their number, shape and rank being equal, as one row of averages."""
    from deltaw.names import family

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((family(row["layer"]), row["shape"], row["rank"], row["scale"]), []).append(row)
    merged = []
    for (name, *_), group in groups.items():
        means = {key: sum(r[key] for r in group) / len(group) for key in ("A", "B", "dW")}
        merged.append({**group[0], "layer": name, "count": len(group), **means})
    return merged


def _table(rows: list[dict[str, Any]]) -> Any:
    made = show.table("layer", "count", "d×k", "rank", "scale", "‖A‖", "‖B‖", "‖ΔW‖")
    for row in rows:
        made.add_row(
            row["layer"], str(row["count"]), row["shape"], str(row["rank"]), f"{row['scale']:g}",
            f"{row['A']:.3f}", f"{row['B']:.3f}", f"{row['dW']:.4f}",
        )  # fmt: skip
    return made
