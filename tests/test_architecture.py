"""The shape of the code: imports point downward, only cli/ prints, the public names are the documented ones."""

import ast
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
    "errors", "config", "layers.ops", "layers", "methods.updates", "methods", "model", "files.formats", "files", "data", "training",
    "runs.evaluation", "runs.memory", "runs.results", "runs.reports", "runs", "cli",
)  # fmt: skip
FILES = sorted(SRC.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    """deltaw modules that a file imports, function-level imports too, without those for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "deltaw":
            assert node.level == 0
            package = SRC.joinpath(*node.module.split(".")[1:])
            modules = {a.name for a in node.names if (package / f"{a.name}.py").exists() or (package / a.name).is_dir()}
            prefix = node.module.removeprefix("deltaw").removeprefix(".")
            found |= {f"{prefix}.{name}".strip(".") for name in modules}
            if len(modules) < len(node.names) and prefix:
                found.add(prefix)
    return found


def room_of(module: str) -> str | None:
    """The room that a module is in; None for the package itself, which names what all rooms offer."""
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


def test_the_house_is_small_enough_to_remember() -> None:
    top = [p.name for p in SRC.iterdir() if p.is_file() or (p / "__init__.py").is_file()]
    assert len(top) <= 13, sorted(top)
    a_file_each = {SRC / "cli", SRC / "methods", SRC / "methods" / "updates"}  # for each command, each method
    for folder in {p.parent for p in FILES} - a_file_each:
        files = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= 12, f"{folder.relative_to(SRC)}: {sorted(files)}"


def test_no_cycles() -> None:
    graph = {module_of(p): imports(p) for p in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' → '.join((*path, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_names_docstrings_and_who_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a file says in its first docstring what it knows"
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    in_cli = "cli" in path.relative_to(SRC).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert not re.match(r"Base[A-Z]|Abstract", node.name) or (
                node.name == "BaseMismatch" and not node.name.endswith(("Mixin", "Manager", "Helper"))
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not in_cli:
            assert node.func.id != "print", f"{module_of(path)}:{node.lineno} prints"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not in_cli:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not {n.split(".")[0] for n in names} & {"rich", "tyro"}


def test_lower_layers_keep_to_their_subject() -> None:
    for name, forbidden in {
        "errors": "torch",
        "config": "torch",
        "layers/ops/merging": "nn",
        "data/records": "torch",
    }.items():
        tree = ast.parse((SRC / f"{name}.py").read_text(encoding="utf-8"))
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
"""Modules and names in pickles of models from before modules moved."""


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("train", "generate", "chat", "eval", "merge", "inspect", "--rank", "--lr", "--max-length"):
        assert word in done.stdout
