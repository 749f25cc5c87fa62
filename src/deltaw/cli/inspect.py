"""`deltaw inspect`: what is in an adapter folder. Needs no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Inspect

if TYPE_CHECKING:
    from torch import Tensor

    from deltaw.files.peft import LoRAFile


def run(command: Inspect) -> None:
    show.quiet_libraries()
    from deltaw.files import peft

    folder = Path(command.adapter)
    file = peft.read(folder)
    rows = [_row(name, A, B, file.scales[name]) for name, (A, B) in file.factors.items()]
    besides = _besides(file)
    size = sum(f.stat().st_size for f in folder.iterdir())
    if command.json:
        shapes = {name: list(tensor.shape) for name, tensor in besides.items()}
        found = {"layers": rows, "besides": shapes, "bytes": size, "config": file.config, "metadata": file.metadata}
        print(json.dumps(found, indent=1))
        return
    facts = {
        "layers": f"{len(rows)}",
        "ranks": ", ".join(str(r) for r in sorted({row["rank"] for row in rows})),
        "parameters": f"{sum(row['parameters'] for row in rows) + sum(t.numel() for t in besides.values()):,}",
        "size": units.size(size),
        "base": str(file.config.get("base_model_name_or_path") or "not named"),
        "fingerprint of the base": file.metadata.get("deltaw_base", "none (not written by deltaw)"),
    }
    show.out.print(show.facts(facts))
    for shown in (_table(rows if command.all_layers else _by_kind(rows)) if rows else None, _besides_table(besides)):
        if shown is not None:
            show.out.print()
            show.out.print(shown)


def _besides(file: LoRAFile) -> dict[str, Tensor]:
    """What there is besides A and B, by what it is."""
    found = {f"magnitude of {layer}": m for layer, m in file.magnitudes.items()}
    found |= {f"bias beside {layer}": b for layer, b in file.biases.items()}
    found |= {f"tokens of {layer}": rows for layer, (_, rows) in file.rows.items()}
    found |= {f"{name}, whole": value for name, value in file.whole.items()}
    return found | {f"{name}, the base's own": value for name, value in file.copies.items()}


def _besides_table(besides: dict[str, Tensor]) -> Any:
    """A line for those that differ in their layer's number alone."""
    from deltaw.names import family

    groups: dict[tuple[str, str], list[Tensor]] = {}
    for name, tensor in besides.items():
        shape = "×".join(str(n) for n in tensor.shape)
        groups.setdefault((family(name), shape), []).append(tensor)
    if not groups:
        return None
    made = show.table("besides A and B", "count", "shape", "size")
    for (name, shape), tensors in groups.items():
        made.add_row(name, str(len(tensors)), shape, units.size(sum(t.numel() * t.element_size() for t in tensors)))
    return made


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
