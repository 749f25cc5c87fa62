"""Write docs/models.md from results/models.json, which scripts/models_sweep.py writes.

python -m scripts.models_page
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package

from tests.conformance.building import folders  # noqa: E402
from tests.conformance.checks import CHECKS  # noqa: E402

RESULTS, PAGE = ROOT / "results" / "models.json", ROOT / "docs" / "models.md"
DONE, OPEN = "✓", "✗"
LIFE = ("identity", "save → load", "merge", "unmerge", "detach")
OTHERS = ("gradients", "rows", "PEFT reads ours", "we read PEFT's")
GROUPS = {
    "pixel": "Images, and images with texts",
    "sound": "Speech and sounds",
    "text": "Texts",
    "other": "Others",
}
_MIXED = (
    "t",
    "Layers get what all rows share (positions), pairs of several rows, or parts of rows in another order (tokens sorted by "
    "expert). So rows cannot have adapters of their own.",
)
# What a check's text holds → the letter and the reason that the page gives
REASONS: dict[str, tuple[str, str]] = {
    "Experts takes several inputs": (
        "e",
        "Stacked experts see the tokens that are sent to them, from all rows of a batch at once. Adapters without experts "
        '(`targets="attention"`) can be mixed in a batch.',
    ),
    "reads the weight itself": (
        "u",
        "The module around a layer uses its weight without calling it. There PEFT's update has no effect; ours has.",
    ),
    "is read by the module around it": (
        "w",
        "The module around a layer multiplies by the layer's weight itself, for all rows at once (Mamba's `dt_proj`).",
    ),
    "cannot be told apart": _MIXED,
    "names 3 rows, but": _MIXED,
    "no output is of one row alone": ("o", "No output belongs to one row alone, so there is nothing to compare."),
    "its own file either": (
        "s",
        "PEFT renames the keys of an adapter like a checkpoint's, and then does not find them. It does not read its own file of "
        "this type either.",
    ),
    "get_input_embeddings": ("g", "PEFT asks the model for its token embeddings, and its class says that it has none."),
    "incompatible with Mamba": ("p", "PEFT refuses to adapt `out_proj` of Mamba-based models. `targets` without it are read."),
    "Error(s) in loading state_dict": ("q", "PEFT reads the experts of this type with other ranks than the file has."),
    "cannot be used": ("r", "PEFT's file has two updates of one stack of experts, or ranks that its settings do not say."),
}  # fmt: skip
TEXT = """# Architectures

Look up your model's type (`model_type` in its config.json) below. A row of ✓ says that every step of an adapter's life works
with `targets="all-linear"`. A letter instead has its reason under [Reasons](#reasons).

{counts}

The models are the smallest that each class builds, with random weights, in float32 on a CPU. So the page says that the
mechanism works on these classes. It says nothing about the quality of an update that was trained on a real model.
[scripts/models_sweep.py](../scripts/models_sweep.py) made the results with transformers {transformers} and torch {torch}
(`python -m scripts.models_sweep`). The checks are those of [tests/conformance](../tests/conformance); 40 of the types are part
of `make test`.

| column | what holds |
| --- | --- |
| layers | how many of the dense layers take an update; embeddings and convolutions, which must be named, are not counted |
| roles | how many of them have which role; `targets="q,v"` adapts the layers of these roles |
{columns}

"""


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = results["models"]
    tried = {n: r for n, r in rows.items() if "checks" in r}
    columns = [f"| life | {' · '.join(f'{name}: {explained(name)}' for name in LIFE)} |"]
    columns += [f"| {name} | {explained(name)} |" for name in OTHERS]
    page = TEXT.format(
        counts=counts(rows),
        transformers=results["transformers"],
        torch=results["torch"].partition("+")[0],
        columns="\n".join(columns),
    )
    letters: dict[str, str] = {}
    for group, title in GROUPS.items():
        inside = [n for n, r in tried.items() if group_of(n, r) == group]
        if inside:
            page += f"## {title}\n\n" + table({n: tried[n] for n in inside}, letters) + "\n"
    page += reasons(letters, tried) + unreached(tried) + untried(rows)
    missing = [f"`{name}`" for name in folders() if name not in rows]
    if missing:
        page += f"\n## Not run yet\n\n`python -m scripts.models_sweep` runs these: {', '.join(missing)}.\n"
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE}: {len(rows)} types")


def counts(rows: dict[str, dict[str, Any]]) -> str:
    """Return a sentence with the number of types of each outcome."""
    kinds: Counter[str] = Counter()
    for row in rows.values():
        if "checks" not in row:
            kinds["not tried" if "not tried" in row else "without dense layers"] += 1
        elif not any(row["checks"].values()):
            kinds["with ✓ in every column"] += 1
        else:
            kinds["with a reason in some column"] += 1
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    wrong = sum(any(row["checks"].get(n) for n in LIFE) for row in rows.values() if "checks" in row)
    return f"**{len(rows)} types**: {said}. Attach, save, load, merge, unmerge and detach: {wrong or 'no'} type fails."


def explained(check: str) -> str:
    """Return the first sentence of the check's docstring."""
    text = " ".join((CHECKS[check].__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".") + "."


def group_of(name: str, row: dict[str, Any]) -> str:
    """Return what the class takes: images, sounds or texts."""
    root = Path(importlib.import_module("transformers").__file__ or "").parent / "models" / name
    modules = [
        importlib.import_module(f"transformers.models.{name}.{p.stem}") for p in sorted(root.glob("modeling_*.py"))
    ]
    cls = next(vars(m)[row["class"]] for m in modules if row["class"] in vars(m))
    wanted = " ".join(inspect.signature(cls.forward).parameters)
    if "pixel" in wanted:
        return "pixel"
    if re.search(r"input_(features|values)\b|audio|spectrogram|waveform", wanted):
        return "sound"
    return "text" if "input_ids" in wanted else "other"


def table(rows: dict[str, dict[str, Any]], letters: dict[str, str]) -> str:
    """Return the table of a group, and add the reasons behind its letters to `letters`."""
    header = ["type", "class", "layers", "roles", "life", "gradients", "rows", "PEFT reads ours", "we read PEFT's"]
    lines = [line(header), line(["---"] * 4 + [":-:"] * 5)]
    for name, row in rows.items():
        checks = row["checks"]
        failed = [check for check in LIFE if checks[check]]
        life = ", ".join(f"{check} {OPEN}" for check in failed) or DONE
        reached = re.match(r"none in (\d+) of (\d+)", checks["gradients"])
        gradients = f"[all but {reached[1]}](#layers-that-no-gradient-reached)" if reached else DONE
        if checks["gradients"] and not reached:
            gradients = OPEN
        cells = [lettered(checks[check], letters) for check in OTHERS[1:]]
        roles = " ".join(f"{role} {count}" for role, count in row["roles"].items())
        lines.append(
            line(
                [
                    f"`{name}`",
                    f"`{row['class']}`",
                    f"{row['adapted']} of {row.get('dense', '?')}",
                    roles,
                    life,
                    gradients,
                    *cells,
                ]
            )
        )
    return "\n".join(lines) + "\n"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def lettered(text: str, letters: dict[str, str]) -> str:
    """Return ✓, the letter of a known reason, or ✗."""
    if not text:
        return DONE
    for part, (letter, reason) in REASONS.items():
        if part in text:
            letters[letter] = reason
            return letter
    return OPEN


def reasons(letters: dict[str, str], rows: dict[str, dict[str, Any]]) -> str:
    """Return the section on what the letters mean, and what is wrong where ✗ stands."""
    said = "## Reasons\n\n| letter | reason |\n| :-: | --- |\n"
    said += "".join(f"| {letter} | {letters[letter]} |\n" for letter in sorted(letters))
    wrong = [
        f"- `{name}`, {check}: {why}\n"
        for name, row in rows.items()
        for check, why in row["checks"].items()
        if why and not why.startswith("none in") and lettered(why, {}) == OPEN
    ]
    return said + (f"\nWhere {OPEN} stands:\n\n" + "".join(wrong) if wrong else "") + "\n"


def unreached(rows: dict[str, dict[str, Any]]) -> str:
    """Return the section on layers without a gradient, by type."""
    some = {n: why for n, r in rows.items() if (why := r["checks"]["gradients"]).startswith("none in")}
    if not some:
        return ""
    said = (
        "## Layers that no gradient reached\n\nThe class computes them and uses their output nowhere (poolers, heads of a vision "
        "tower), or the small batch does not go through them. Training reports in its first step which layers its data does "
        "not reach.\n\n"
    )
    return said + "".join(f"- `{name}`: {why.partition(': ')[2]}\n" for name, why in some.items()) + "\n"


def untried(rows: dict[str, dict[str, Any]]) -> str:
    """Return the section on types without dense layers, and those that could not be built or called, with the reason."""
    without = [f"`{n}`" for n, r in rows.items() if "refused" in r]
    said = f"## Without dense layers\n\n{', '.join(without)}: nothing for `all-linear` to adapt.\n\n" if without else ""
    failed = {n: r["not tried"] for n, r in rows.items() if "not tried" in r}
    if failed:
        said += "## Not tried\n\nNo small model of these could be built or called here. Why the first try failed:\n\n"
        said += "".join(f"- `{name}`: {first(why)}\n" for name, why in failed.items())
    return said


def first(why: str) -> str:
    """The first of several reasons, in short and without what it was tried with."""
    text = re.sub(r"^\w+ (narrow|sixteenth|eighth|fourth|shallow)[^:]*: ", "", " ".join(why.split("; ")[0].split()))
    return text if len(text) <= 160 else f"{text[:157]}…"


if __name__ == "__main__":
    main()
