"""Write docs/models.md: what deltaw does on each architecture of tests/architectures.py, by the checks of
tests/test_architectures.py.

    python -m scripts.models_page

A check that fails stops it, and the page stays as it was.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package

import torch  # noqa: E402
import transformers  # noqa: E402
from tests.architectures import TABLE, Architecture  # noqa: E402
from tests.test_architectures import CHECKS, METHOD, resolved  # noqa: E402

import deltaw  # noqa: E402
from deltaw.errors import AdapterError, TargetError  # noqa: E402
from deltaw.layers import why_not  # noqa: E402

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
DONE, REFUSED, NOTHING = "✓", "refused", "—"
PAGE = """# Architectures

This page is written by [scripts/models_page.py](../scripts/models_page.py), which runs the checks of
[tests/test_architectures.py](../tests/test_architectures.py) on the models of
[tests/architectures.py](../tests/architectures.py). The models are tiny and their weights are random. So the page says that
the mechanism works on these classes. It says nothing about the quality of an update that was trained on a real model.

Made with transformers {transformers}, torch {torch}, float32 on a CPU. Targets are `all-linear`.

{checks}

{table}

Layers are named by how their names end. A role is a short name for a kind of layer, the same on every architecture:
`targets="q,v"` adapts the query and value layers. Where a model fuses several roles in one layer, a role means its slice of
that layer, and `all-linear` adapts the whole of it. `gate_up` stands for gate and up where their slices are not known. Presets
and roles leave out what is "only where named" and output heads; `targets` with their names adapts them.
{refusals}"""


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    refusals: list[str] = []
    table = [row(entry, refusals) for entry in TABLE]
    header = ["architecture", "class", "layers that all-linear adapts", "roles", *CHECKS, "takes no update"]
    lines = [line(header), line(["---"] * 4 + [":-:"] * len(CHECKS) + ["---"]), *map(line, table)]
    said = "\n## What is refused\n\n" + "".join(f"{refusal}\n" for refusal in refusals) if refusals else ""
    text = PAGE.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        checks="\n".join(f"- **{name}**: {explained(name)}" for name in CHECKS),
        table="\n".join(lines),
        refusals=said,
    )
    page = ROOT / "docs" / "models.md"
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {len(TABLE)} architectures, {len(CHECKS)} checks each, {len(refusals)} refused")


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def explained(check: str) -> str:
    """The first sentence of the check's own docstring."""
    text = " ".join((CHECKS[check].__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".") + "."


def row(entry: Architecture, refusals: list[str]) -> list[str]:
    """A line of the table. What deltaw refuses, and how, is added to `refusals`."""
    first = [entry.name, f"`{entry.model.__name__}`"]
    model = entry.build()
    try:
        deltaw.attach(model, METHOD)
    except TargetError as error:
        refusals.append(f"- {entry.name}: {one_line(error)}")
        reasons = {n: why for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and (why := why_not(m))}
        return [*first, NOTHING, NOTHING, *[REFUSED] * len(CHECKS), left_out(entry, reasons)]
    adapter = deltaw.summary(model).adapters["default"]
    ends = [f"`{end}`" for several in (*entry.roles.values(), entry.others) for end in sorted(several)]
    layers = f"{len(resolved(model, 'all-linear'))}: {' '.join(ends)}"
    checks = [checked(entry, check, refusals) for check in CHECKS]
    return [*first, layers, roles(entry), *checks, left_out(entry, adapter.left_out)]


def checked(entry: Architecture, check: str, refusals: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            CHECKS[check](entry, Path(folder))
        except AdapterError as error:
            if not (check == "rows" and entry.rows_refused):
                raise
            refusals.append(f"- {entry.name}, rows: {one_line(error)}")
            return REFUSED
    return DONE


def one_line(error: Exception) -> str:
    """What an error lists, or all that it says."""
    problems = [text.removeprefix("  - ") for text in str(error).splitlines() if text.startswith("  - ")]
    return "; ".join(problems) or " ".join(str(error).split())


def roles(entry: Architecture) -> str:
    """The roles that mean layers of this model, and those that mean slices of them."""
    model = entry.build()
    asked = (*ROLES, *(role for role in ("qkv", "gate_up") if entry.unsliced))
    found = {role: resolved(model, role) for role in asked}
    whole = [role for role, layers in found.items() if layers and not any(layers.values())]
    slices = [role for role, layers in found.items() if any(layers.values())]
    return " ".join(whole) + (f"; slices: {' '.join(slices)}" if slices else "")


def left_out(entry: Architecture, reasons: dict[str, str]) -> str:
    """Reason → the names of its weights, in short."""
    short: dict[str, dict[str, None]] = {}
    for name, why in reasons.items():
        why = "only where named" if why.endswith("where it is named") else why.replace(" that deltaw adapts", "")
        ends = [end for end in entry.left_out if f".{name}".endswith(f".{end}")]
        short.setdefault(why, {})[f"`{max(ends, key=len) if ends else name.rpartition('.')[2]}`"] = None
    return "; ".join(f"{' '.join(names)}: {why}" for why, names in short.items())


if __name__ == "__main__":
    main()
