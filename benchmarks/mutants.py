"""Count the faults that the tests notice: a seeded sample of small ones, planted one at a time, each against its file's tests.

    pip install cosmic-ray
    python benchmarks/mutants.py                     # 320 mutants, two at a time
    python benchmarks/mutants.py layers.ops.linear   # one module's part of these

Writes results/mutants.json: the share of mutants that a test noticed, and the survivors with their lines. Modules that were
not tried keep their old results. The mutants are cosmic-ray's: another operator, comparison, number or keyword, a removed
`not`, decorator or loop. Three kinds are left out: changed annotations and protocols, which are never evaluated, `is` for
`==`, and those that need a variable's name. No file is changed: a forked process imports the mutated source in the module's
place.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.abc
import importlib.machinery
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType

import machine

ROOT = Path(__file__).resolve().parents[1]
TESTS: Mapping[str, tuple[str, ...]] = {
    "layers.ops.linear": ("tests/layers/ops/test_linear.py",),
    "layers.ops.rows": ("tests/layers/ops/test_rows.py", "tests/model/test_switch.py"),
    "layers.routing": ("tests/layers/test_routing.py", "tests/model/test_passes.py", "tests/model/test_switch.py"),
    "model.merging.merge": (
        "tests/model/merging/test_merge.py",
        "tests/model/merging/test_kept.py",
        "tests/model/merging/test_ties.py",
        "tests/model/merging/test_checks.py",
        "tests/model/merging/test_report.py",
    ),
    "layers.ops.undo": ("tests/layers/ops/test_undo.py", "tests/layers/ops/test_residual.py"),
    "training.loop.steps": ("tests/training/test_loop.py", "tests/training/test_models.py", "tests/runs/test_train.py"),
    "data.batches": ("tests/data/test_batches.py",),
    "runs.evaluation.bootstrap": ("tests/runs/evaluation/test_choice.py",),
}
"""Modules of deltaw, and the tests that are theirs."""
SAME = ("_Eq_Is", "_NotEq_IsNot")
"""Operators whose mutants mean the same, for values that Python keeps once."""
SENTINELS = ("UNSET",)
"""Values of class `object`, which are equal to themselves alone: `==` means `is`."""
PRELOADED = ("torch", "numpy", "transformers.models.llama.modeling_llama", "pytest", "hypothesis", "safetensors.torch")


@dataclass(frozen=True)
class Mutant:
    module: str
    operator: str
    """cosmic-ray's name of it."""
    occurrence: int
    source: str
    """The whole mutated module."""
    change: tuple[str, ...]
    """Lines taken out (-) and put in (+)."""


@dataclass(frozen=True)
class Verdict:
    module: str
    operator: str
    change: tuple[str, ...]
    outcome: str
    """ "killed", "timeout" (noticed as well) or "survived"."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all unless named")
    parser.add_argument("--sample", type=int, default=320, help="mutants, spread over modules by their number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    modules = chosen.modules or list(TESTS)
    if unknown := [name for name in modules if name not in TESTS]:
        parser.error(f"no tests are listed for {', '.join(unknown)}; modules: {', '.join(TESTS)}")
    mutants = [
        m for m in sample({name: mutants_of(name) for name in TESTS}, chosen.sample, chosen.seed) if m.module in modules
    ]
    preload()
    limits = {name: 20 + 4 * clean_run(name) for name in modules}
    with ThreadPoolExecutor(chosen.jobs) as pool:
        verdicts = list(pool.map(lambda mutant: judged(mutant, limits[mutant.module]), mutants))
    report(verdicts, chosen.sample, chosen.seed)


def mutants_of(module: str) -> list[Mutant]:
    """All that cosmic-ray's operators make of a module, in a fixed order."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = path_of(module).read_text(encoding="utf-8")
    evaluated, mutants = tree_of(source), []
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or name.endswith(SAME):
            continue
        occurrence = 0
        while (changed := mutate_code(source, operator(), occurrence)) is not None:
            if tree_of(changed) not in (evaluated, None):
                mutants.append(Mutant(module, name, occurrence, changed, lines_changed(source, changed)))
            occurrence += 1
    return mutants


def tree_of(source: str) -> str | None:
    """What of a module is evaluated, as text; None where it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
            node.body, node.decorator_list = [ast.Pass()], []  # for type checkers alone
        elif isinstance(node, ast.Compare) and getattr(node.comparators[0], "id", None) in SENTINELS:
            same: Mapping[type[ast.cmpop], ast.cmpop] = {ast.Eq: ast.Is(), ast.NotEq: ast.IsNot()}
            node.ops[0] = same.get(type(node.ops[0]), node.ops[0])
    return ast.dump(tree)


def lines_changed(source: str, changed: str) -> tuple[str, ...]:
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")
    return tuple(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def sample(mutants: Mapping[str, Sequence[Mutant]], size: int, seed: int) -> list[Mutant]:
    """A seeded sample, from each module as many as its share of all mutants; the same whichever modules are tried together."""
    every = sum(len(of_module) for of_module in mutants.values())
    return [
        mutant
        for name, of_module in mutants.items()
        for mutant in random.Random(f"{seed} {name}").sample(of_module, max(1, round(size * len(of_module) / every)))
    ]


def preload() -> None:
    """Import what takes long and is not tested, once for all forks."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    for name in PRELOADED:
        importlib.import_module(name)


def clean_run(module: str) -> float:
    """Seconds that the tests take without a mutant. Exits where they fail."""
    mutant = Mutant(module, "", 0, path_of(module).read_text(encoding="utf-8"), ())
    verdict = judged(mutant, 600)
    if verdict.outcome != "survived":
        sys.exit(f"The tests of {module} fail without a mutant: {' '.join(TESTS[module])}")
    return verdict.seconds


def judged(mutant: Mutant, limit: float) -> Verdict:
    """Run the module's tests against one mutant, in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(mutant,))
    begin = time.monotonic()
    process.start()
    process.join(limit)
    outcome = "survived" if process.exitcode == 0 else "killed"
    if process.is_alive():
        outcome = "timeout"
        process.kill()
        process.join()
    verdict = Verdict(mutant.module, mutant.operator, mutant.change, outcome, round(time.monotonic() - begin, 1))
    if mutant.change:
        print(f"{outcome:9}{verdict.seconds:6.1f} s  {mutant.module}  {' | '.join(mutant.change)}", flush=True)
    return verdict


def run_tests(mutant: Mutant) -> None:
    """In the forked process: exit code 0 when no test noticed."""
    import pytest

    os.chdir(ROOT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.meta_path.insert(0, Planted(mutant))
    choice = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    os._exit(int(pytest.main([*choice, *TESTS[mutant.module]])))


class Planted(importlib.abc.MetaPathFinder):
    """Finds the mutated source where the module is imported."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.mutant = f"deltaw.{mutant.module}", mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        loader = MutatedLoader(fullname, str(path_of(self.mutant.module)), self.mutant.source)
        return importlib.machinery.ModuleSpec(fullname, loader, origin=loader.path)


class MutatedLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def path_of(module: str) -> Path:
    return ROOT / "src" / "deltaw" / f"{module.replace('.', '/')}.py"


def report(verdicts: Sequence[Verdict], size: int, seed: int) -> None:
    """Write results/mutants.json: the modules that were tried, and those that stand there of the same sample."""
    path = machine.RESULTS / "mutants.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    modules = before["modules"] if (before.get("sample"), before.get("seed")) == (size, seed) else {}
    for name in dict.fromkeys(verdict.module for verdict in verdicts):
        tried = [verdict for verdict in verdicts if verdict.module == name]
        survivors = [asdict(verdict) for verdict in tried if verdict.outcome == "survived"]
        noticed = len(tried) - len(survivors)
        modules[name] = {"tests": TESTS[name], "mutants": len(tried), "noticed": noticed, "survivors": survivors}
    every, noticed = (sum(module[key] for module in modules.values()) for key in ("mutants", "noticed"))
    share = round(noticed / every, 3)
    machine.write("mutants", {"sample": size, "seed": seed, "share": share, "modules": modules})


if __name__ == "__main__":
    main()
