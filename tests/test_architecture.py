"""The rules that keep the project readable: imports run one way, one file prints, and help is instant."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_awq_cli

PACKAGE = Path(gemma_awq_cli.__file__).parent
# The rooms in the order of their imports: a room may import from itself and from the rooms of earlier rows.
# Rooms of one row are siblings and do not import each other.
ROOMS = (
    ("errors", "events"),
    ("system",),
    ("awq", "models.gemma"),
    ("models.packed_formats",),
    ("kernels",),
    ("models.checkpoints",),
    ("models.text",),
    ("models.forward", "calibration_text", "reports"),
    ("fidelity", "generate"),
    ("quantize", "bench", "inspection", "inventory", "export", "serve"),
    ("publish",),
    ("pages",),
    ("cli",),
)
RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row}


def room_of(module: str) -> str | None:
    """gemma_awq_cli.models.forward.session -> models.forward; None: the package itself and `__main__`."""
    name = module.removeprefix("gemma_awq_cli").removeprefix(".")
    return next((room for room in RANK if name == room or name.startswith(f"{room}.")), None)


def imports() -> list[tuple[str, str]]:
    """(importing module, imported module or room) inside the package, lazy imports included."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    pairs = []
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module in files:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in files else node.module for name in inside]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name in files]
            pairs += [(module, name) for name in names]
    return pairs


def test_every_file_has_a_room() -> None:
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if path.name not in ("__init__.py", "__main__.py"):
            assert room_of(module), f"{module} lies in no room"


def test_imports_run_one_way() -> None:
    pairs = imports()
    assert len(pairs) > 50
    for importer, imported in pairs:
        importing, used = room_of(importer), room_of(imported)
        if importing and used and importing != used:
            assert RANK[used] < RANK[importing], f"{importer} imports {imported}"


def test_no_imports_run_in_a_circle() -> None:
    """Inside a room either, and lazy imports count; the package itself only names what the Python API loads on use."""
    modules = {importer for importer, _ in imports()} - {"gemma_awq_cli"}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for importer, imported in imports():
        if importer in modules and imported in modules and imported != importer:
            graph[importer].add(imported)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as circle:
        pytest.fail(" -> ".join(reversed(circle.args[1])))


def test_the_maths_chooses_no_device_and_opens_no_file() -> None:
    for path in (PACKAGE / "awq").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("cuda", "open(", "pathlib", "transformers"):
            assert word not in text, f"{path.name} mentions {word}"


def test_only_output_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("console.py", "streams.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("stdout", "stderr"), f"{path.name}:{node.lineno}"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\n"
        "for command in ([], ['quantize'], ['run'], ['serve'], ['bench'], ['export'], ['inspect'], ['push'],\n"
        "                ['list'], ['show'], ['rm'], ['verify']):\n"
        "    assert main([*command, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'awq', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_autoawq_stays_behind_its_boundary() -> None:
    """It is archived and may be absent: one file loads a piece of it, and nothing imports its package."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name == "awq" or name.startswith("awq.") for name in names), path
            if isinstance(node, ast.Constant) and node.value in ("awq", "autoawq") and "find_spec" in ast.unparse(tree):
                assert path.name == "autoawq.py", path
