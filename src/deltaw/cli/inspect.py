"""`deltaw inspect`: the contents of an adapter folder. Needs no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Inspect
from deltaw.files import units

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from deltaw.files.formats.method_file import MethodFile
    from deltaw.files.formats.peft import LoRAFile


@dataclass(frozen=True)
class _Layer:
    """The low-rank update of one layer, or the means of several that are alike."""

    layer: str
    shape: str
    """d×k of the weight; of stacked experts their number before it."""
    rank: int
    scale: float
    parameters: int
    dtype: str
    A: float
    """‖A‖, the Frobenius norm."""
    B: float
    dW: float
    """‖ΔW‖."""
    count: int = 1


def run(command: Inspect) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.files.formats import method_file, peft

    folder = Path(command.adapter)
    if peft.method_of(folder):
        _show_method(method_file.read(folder), folder, command)
        return
    file = peft.read(folder, of_model=True)
    rows = [_row(name, file) for name in file.factors]
    besides = _besides(file)
    size = sum(f.stat().st_size for f in folder.iterdir())
    if command.json:
        shapes = {name: list(tensor.shape) for name, tensor in besides.items()}
        layers = [dataclasses.asdict(row) for row in rows]
        contents = {
            "layers": layers,
            "besides": shapes,
            "bytes": size,
            "config": dict(file.config.settings),
            "metadata": file.metadata,
        }
        print(show.as_json(contents))
        return
    facts = {
        "layers": f"{len(rows)}",
        "ranks": ", ".join(str(r) for r in sorted({row.rank for row in rows})),
        "parameters": f"{sum(row.parameters for row in rows) + sum(t.numel() for t in besides.values()):,}",
        "size": units.size(size),
        "base": file.config.base or "not named",
        "fingerprint of the base": file.metadata.get("deltaw_base", "none (not written by deltaw)"),
        **_ends(file, folder),
    }
    if not file.changes_anything:
        facts["changes"] = "nothing: B is zero in all layers, as before the first step of a training"
    show.facts(facts)
    table = _table(rows if command.all_layers else _by_kind(rows)) if rows else None
    for shown in (table, _tensor_table(besides, "besides A and B")):
        if shown is not None:
            show.out.print()
            show.out.print(shown)


def _show_method(file: MethodFile, folder: Path, command: Inspect) -> None:
    """Show an adapter of another method than LoRA."""
    size = sum(f.stat().st_size for f in folder.iterdir())
    if command.json:
        shapes = {name: list(tensor.shape) for name, tensor in file.tensors.items()}
        contents = {
            "method": file.method,
            "settings": file.settings,
            "tensors": shapes,
            "bytes": size,
            "metadata": file.metadata,
        }
        print(show.as_json(contents))
        return
    settings = {key: value for key, value in file.settings.items() if value not in ("", False, None, [])}
    facts = {
        "method": file.method,
        **{key: str(value) for key, value in settings.items() if len(str(value)) < 100},
        "parameters": f"{sum(t.numel() for t in file.tensors.values()):,}",
        "size": units.size(size),
        "base": file.config.base or "not named",
        "fingerprint of the base": file.metadata.get("deltaw_base", "none (not written by deltaw)"),
        **_ends(file, folder),
    }
    show.facts(facts)
    show.out.print()
    show.out.print(_tensor_table(file.tensors, "tensors", every=command.all_layers))


def _ends(file: LoRAFile | MethodFile, folder: Path) -> dict[str, str]:
    """The end tokens of the adapter's training; empty where its files have none."""
    from deltaw.files.formats import peft

    ends = peft.ends_of(file.metadata, folder)
    return {"end tokens": ", ".join(map(str, ends))} if ends else {}


def _besides(file: LoRAFile) -> dict[str, Tensor]:
    """The tensors besides A and B, by what they are."""
    tensors = {f"magnitude of {layer}": m for layer, m in file.magnitudes.items()}
    tensors |= {f"bias beside {layer}": b for layer, b in file.biases.items()}
    tensors |= {f"tokens of {layer}": rows for layer, (_, rows) in file.rows.items()}
    tensors |= {f"{name}, whole": value for name, value in file.whole.items()}
    return tensors | {f"{name}, the base's": value for name, value in {**file.copies, **file.originals}.items()}


def _tensor_table(tensors: Mapping[str, Tensor], title: str, *, every: bool = False) -> Table | None:
    """A line for each tensor, or (not `every`) for tensors that differ only in their layer's number; None without tensors."""
    from deltaw.layers.names import family

    groups: dict[tuple[str, str], list[Tensor]] = {}
    for name, tensor in tensors.items():
        shape = "×".join(str(n) for n in tensor.shape)
        groups.setdefault((name if every else family(name), shape), []).append(tensor)
    if not groups:
        return None
    table = show.table(title, "count", "shape", "size")
    for (name, shape), alike in groups.items():
        table.add_row(name, str(len(alike)), shape, units.size(sum(t.numel() * t.element_size() for t in alike)))
    return table


def _row(name: str, file: LoRAFile) -> _Layer:
    from deltaw.layers.ops.merging import delta_norm

    (A, B), scale = file.matrices(name), file.scales[name]
    shape = f"{B.shape[-2]}×{A.shape[-1]}"
    return _Layer(
        file.shown(name), shape if A.ndim == 2 else f"{len(A)} × {shape}", A.shape[-2], scale, A.numel() + B.numel(),
        str(A.dtype).removeprefix("torch."), float(A.double().norm()), float(B.double().norm()), delta_norm(A, B, scale),
    )  # fmt: skip


def _by_kind(rows: list[_Layer]) -> list[_Layer]:
    """Layers of the same shape, rank and scale that differ only in their number, as one row of means."""
    from deltaw.layers.names import family

    groups: dict[tuple[str, str, int, float], list[_Layer]] = {}
    for row in rows:
        groups.setdefault((family(row.layer), row.shape, row.rank, row.scale), []).append(row)
    return [
        dataclasses.replace(
            alike[0], layer=name, count=len(alike), A=sum(row.A for row in alike) / len(alike),
            B=sum(row.B for row in alike) / len(alike), dW=sum(row.dW for row in alike) / len(alike),
        )
        for (name, *_), alike in groups.items()
    ]  # fmt: skip


def _table(rows: list[_Layer]) -> Table:
    table = show.table("layer", "count", "d×k", "rank", "scale", "‖A‖", "‖B‖", "‖ΔW‖")
    for row in rows:
        table.add_row(
            row.layer, str(row.count), row.shape, str(row.rank), f"{row.scale:g}", f"{row.A:.3f}", f"{row.B:.3f}",
            f"{row.dW:.4f}",
        )  # fmt: skip
    return table
