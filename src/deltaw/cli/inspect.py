"""`deltaw inspect`: what is in an adapter folder. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.cli import show
from deltaw.cli.flags import Inspect
from deltaw.files import units

if TYPE_CHECKING:
    from torch import Tensor

    from deltaw.files.formats.method_file import MethodFile
    from deltaw.files.formats.peft import LoRAFile


def run(command: Inspect) -> None:
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
        found = {
            "layers": rows,
            "besides": shapes,
            "bytes": size,
            "config": dict(file.config.settings),
            "metadata": file.metadata,
        }
        print(json.dumps(found, indent=1))
        return
    facts = {
        "layers": f"{len(rows)}",
        "ranks": ", ".join(str(r) for r in sorted({row["rank"] for row in rows})),
        "parameters": f"{sum(row['parameters'] for row in rows) + sum(t.numel() for t in besides.values()):,}",
        "size": units.size(size),
        "base": str(file.config.base_model_name_or_path or "not named"),
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
    """An adapter of another method than LoRA."""
    size = sum(f.stat().st_size for f in folder.iterdir())
    if command.json:
        shapes = {name: list(tensor.shape) for name, tensor in file.tensors.items()}
        found = {
            "method": file.method,
            "settings": file.settings,
            "tensors": shapes,
            "bytes": size,
            "metadata": file.metadata,
        }
        print(json.dumps(found, indent=1))
        return
    given = {key: value for key, value in file.settings.items() if value not in ("", False, None, [])}
    facts = {
        "method": file.method,
        **{key: str(value) for key, value in given.items() if len(str(value)) < 100},
        "parameters": f"{sum(t.numel() for t in file.tensors.values()):,}",
        "size": units.size(size),
        "base": str(file.config.base_model_name_or_path or "not named"),
        "fingerprint of the base": file.metadata.get("deltaw_base", "none (not written by deltaw)"),
        **_ends(file, folder),
    }
    show.facts(facts)
    show.out.print()
    show.out.print(_tensor_table(file.tensors, "tensors", every=command.all_layers))


def _ends(file: LoRAFile | MethodFile, folder: Path) -> dict[str, str]:
    """The tokens that end what the adapter was taught to say, where it says so."""
    from deltaw.files.formats import peft

    ends = peft.ends_of(file.metadata, folder)
    return {"end tokens": ", ".join(map(str, ends))} if ends else {}


def _besides(file: LoRAFile) -> dict[str, Tensor]:
    """What there is besides A and B, by what it is."""
    found = {f"magnitude of {layer}": m for layer, m in file.magnitudes.items()}
    found |= {f"bias beside {layer}": b for layer, b in file.biases.items()}
    found |= {f"tokens of {layer}": rows for layer, (_, rows) in file.rows.items()}
    found |= {f"{name}, whole": value for name, value in file.whole.items()}
    return found | {f"{name}, the base's own": value for name, value in {**file.copies, **file.originals}.items()}


def _tensor_table(tensors: Mapping[str, Tensor], title: str, *, every: bool = False) -> Any:
    """A line for those that differ in their layer's number alone; None where there are no tensors."""
    from deltaw.layers.names import family

    groups: dict[tuple[str, str], list[Tensor]] = {}
    for name, tensor in tensors.items():
        shape = "×".join(str(n) for n in tensor.shape)
        groups.setdefault((name if every else family(name), shape), []).append(tensor)
    if not groups:
        return None
    made = show.table(title, "count", "shape", "size")
    for (name, shape), alike in groups.items():
        made.add_row(name, str(len(alike)), shape, units.size(sum(t.numel() * t.element_size() for t in alike)))
    return made


def _row(name: str, file: LoRAFile) -> dict[str, Any]:
    from deltaw.layers.ops.merging import delta_norm

    (A, B), scale = file.matrices(name), file.scales[name]
    shape = f"{B.shape[-2]}×{A.shape[-1]}"
    return {
        "layer": file.shown(name), "shape": shape if A.ndim == 2 else f"{len(A)} × {shape}", "rank": A.shape[-2], "scale": scale,
        "parameters": A.numel() + B.numel(), "dtype": str(A.dtype).removeprefix("torch."),
        "A": float(A.double().norm()), "B": float(B.double().norm()), "dW": delta_norm(A, B, scale), "count": 1,
    }  # fmt: skip


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that differ only in their number, shape and rank being equal, as one row of averages."""
    from deltaw.layers.names import family

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
