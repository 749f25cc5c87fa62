"""The shape of the code: imports point downward, only cli/ prints, names and docstrings say what things are."""

import ast
import functools
import importlib
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deltaw

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "deltaw"

# A module may import from its own room and the rooms before it. Inner rooms stand before the room that they are in.
ROOMS = (
    "errors", "config", "progress", "layers.processes", "layers.ops", "layers", "methods.updates", "methods", "model", "files.formats", "files", "data.sources",
    "data.chats", "data.fields", "data", "training", "runs.resume", "runs.evaluation", "runs.memory", "runs.results", "runs.reports", "runs", "cli",
)  # fmt: skip
FILES = sorted(SRC.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The deltaw modules that a file imports, also within functions, except those for type checking only."""
    tree = tree_of(path)
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "deltaw":
            assert node.level == 0
            package = SRC.joinpath(*node.module.split(".")[1:])
            modules = {a.name for a in node.names if (package / f"{a.name}.py").exists() or (package / a.name).is_dir()}
            prefix = node.module.removeprefix("deltaw").removeprefix(".")
            names |= {f"{prefix}.{name}".strip(".") for name in modules}
            if len(modules) < len(node.names) and prefix:
                names.add(prefix)
    return frozenset(names)


def room_of(module: str) -> str | None:
    """Return the room that a module is in; None for the package itself, which names what all rooms offer."""
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(inside, key=len, default=None)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downward(path: Path) -> None:
    room = room_of(module_of(path))
    if room is None:
        assert path.parent == SRC and path.name in ("__init__.py", "__main__.py"), "every module is in a room"
        return
    lower = ROOMS[: ROOMS.index(room) + 1]
    upward = {name for name in imports(path) if (other := room_of(name)) is not None and other not in lower}
    assert not upward, f"{module_of(path)} imports upward: {upward}"


@pytest.mark.parametrize("folder", ["benchmarks", "examples/quickstart", "scripts"])
def test_programs_beside_the_package_import_what_there_is(folder: str) -> None:
    """Benchmarks are run seldom: what moves in src/deltaw moves in them."""
    names = {
        (node.module or "", alias.name)
        for path in sorted((ROOT / folder).glob("*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deltaw"
        for alias in node.names
    }
    assert names
    missing = [f"{module}.{name}" for module, name in sorted(names) if not has(module, name)]
    assert not missing


def has(module: str, name: str) -> bool:
    """Return True if the module has the name, or is a package with a module of that name."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def test_mutants_are_tried_against_tests_that_there_are() -> None:
    tree = tree_of(ROOT / "benchmarks" / "mutants.py")
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "TESTS")
    assert table is not None
    for module, tests in ast.literal_eval(table).items():
        assert (SRC / f"{module.replace('.', '/')}.py").is_file(), module
        assert all((ROOT / test).is_file() for test in tests), module


def test_no_folder_has_more_files_than_one_remembers() -> None:
    top = [p.name for p in SRC.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    assert len(top) <= 13, sorted(top)
    a_file_each = {SRC / "cli", SRC / "methods", SRC / "methods" / "updates"}  # for each command, each method
    for folder in {p.parent for p in FILES} - a_file_each:
        files = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= 12, f"{folder.relative_to(SRC)}: {sorted(files)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module_of(p): imports(p) for p in FILES}
    visited: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' → '.join((*path, name))}"
        if name not in visited:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*path, name))
            visited.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_says_what_it_holds(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), "a file's docstring says what it holds"
    assert path.stem not in ("utils", "helpers", "common", "misc")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_class_is_named_for_its_subject(path: Path) -> None:
    """Not for its part in a hierarchy (Base…, Abstract…) or for no subject at all (…Manager)."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef) and node.name != "BaseMismatch":  # the error of a wrong base model
            assert not re.match(r"Base[A-Z]|Abstract", node.name), node.name
            assert not node.name.endswith(("Mixin", "Manager", "Helper")), node.name


@pytest.mark.parametrize("path", [path for path in FILES if SRC / "cli" not in path.parents], ids=module_of)
def test_only_the_command_line_prints(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{module_of(path)}:{node.lineno} prints"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not {n.split(".")[0] for n in names} & {"rich", "click"}


NO_VERB_OR_NOUN = {"of", "those", "what", "where", "by", "that", "whether", "how", "which"}
"""Words that no docstring begins with: it begins with a verb, or with the noun of the thing."""
NO_CONTENT = {"found", "made", "own", "given", "done", "each"}
"""Words that name no variable: a name says what is in it."""


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_docstrings_begin_with_a_verb_or_a_noun(path: Path) -> None:
    lines = {
        text.value.lineno: str(text.value.value)
        for node in ast.walk(tree_of(path))
        if isinstance(body := getattr(node, "body", None), list)  # a lambda's is one expression
        for text in body
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    wrong = {line: text[:60] for line, text in lines.items() if first_word(text) in NO_VERB_OR_NOUN}
    assert not wrong


def first_word(text: str) -> str:
    return next(iter(re.findall(r"\w+", text)), "").lower()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_name_says_what_is_in_it(path: Path) -> None:
    tree = tree_of(path)
    names = {(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}
    assert not {f"{name}, line {line}" for name, line in names if name in NO_CONTENT}


def test_low_rooms_keep_to_their_subject() -> None:
    for name, forbidden in {
        "errors": "torch",
        "config": "torch",
        "layers/ops/merging": "nn",
        "data/records": "torch",
    }.items():
        tree = tree_of(SRC / f"{name}.py")
        imported = {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert forbidden not in imported, name


def test_public_names_are_the_documented_ones() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n# public names\n(.*?)```", text, re.DOTALL)
    assert block, "docs/design.md has no block of public names"
    documented = re.findall(r"^(\w+)", block.group(1), re.MULTILINE)
    assert sorted(documented) == sorted(set(deltaw.__all__) - {"__version__"})
    assert all(getattr(deltaw, name).__doc__ for name in documented)
    modules = {p.stem for p in SRC.glob("*.py")} | {p.name for p in SRC.iterdir() if p.is_dir()}
    assert not modules & set(deltaw.__all__), "a module of that name would hide the function"


BEFORE = {
    "attached": "Adapters Attached", "checksums": "Stamp", "inserted": "Inserted", "lowrank": "Product",
    "layers": "Kind LinearKind Conv1DKind EmbeddingKind QuantisedKind Conv1dKind Conv2dKind Conv3dKind",
    "originals": "Copy Correction Kept", "passes": "Begin End Generate", "prefixes": "Prepended PrefixOfBlock",
    "residency": "Residency", "residual": "Residual", "routes": "Route", "scaled": "AddedBias Scaled", "slots": "Slot _unpickled",
    "ties": "Untied", "updates": "LowRank LowRankRescaled Recentred Replaced ReplacedRows Sliced", "weights": "OnWeights Stack",
    "methods.lora": "LoRA", "methods.dora": "DoRA", "methods.ia3": "IA3", "methods.full": "Full", "methods.prefix": "Prefix",
    "methods.bitfit": "BitFit", "methods.bottleneck": "Bottleneck",
}  # fmt: skip
"""Modules and their classes, as pickles of models name them that were written before the rooms."""


@pytest.mark.parametrize("module", BEFORE)
def test_pickles_of_the_build_before_find_their_classes(module: str) -> None:
    reader = pickle.Unpickler(io.BytesIO())
    for name in BEFORE[module].split():
        assert reader.find_class(f"deltaw.{module}", name).__name__ == name


def test_help_needs_no_torch_and_knows_every_command() -> None:
    code = (
        "import sys\n"
        "from deltaw.cli import main\n"
        "for words in (['--help'], ['train', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for word in ("train", "generate", "chat", "eval", "merge", "inspect", "--rank", "--lr", "--max-length"):
        assert word in process.stdout
