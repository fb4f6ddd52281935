"""Holds conventions that ruff does not check: tests use public names only, and src names its types and its errors."""

import ast
import functools
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
# Public in spite of their names: Accelerate documents its own for tests.
DOCUMENTED = {"os._exit", "AcceleratorState._reset_state"}
TYPED = {"accelerator", "cohort", "context", "model", "workspace"}  # arguments whose type is one of the project's own


@functools.cache
def nodes(folder: Path) -> list[tuple[str, ast.AST]]:
    """("file:line", node) of every syntax node in the Python files of a folder."""
    return [
        (f"{path.relative_to(folder.parent)}:{getattr(node, 'lineno', 0)}", node)
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


def private_names(node: ast.AST) -> list[str]:
    """Private names of other objects that a node uses: an attribute, an import, or a name that is patched."""
    if isinstance(node, ast.Attribute):
        of_another = ast.unparse(node.value) not in ("self", "cls", "super()")
        return [ast.unparse(node)] if of_another and is_private(node.attr) else []
    if isinstance(node, ast.ImportFrom):
        own = node.level or (node.module or "").split(".")[0] in ("ldae", "faults")
        return [alias.name for alias in node.names if own and is_private(alias.name)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("setattr", "delattr"):
        texts = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
        return [text for text in texts if is_private(str(text).rpartition(".")[2])]
    return []


def test_tests_use_no_private_name_of_another_object():
    found = {
        f"{place}: {name}" for place, node in nodes(TESTS) for name in private_names(node) if name not in DOCUMENTED
    }
    assert not found


def test_tests_build_objects_by_their_constructors():
    found = {place for place, node in nodes(TESTS) if isinstance(node, ast.Attribute) and node.attr == "__new__"}
    assert not found


def test_src_prints_nothing():
    calls = [(place, node.func) for place, node in nodes(SOURCE) if isinstance(node, ast.Call)]
    assert not {place for place, function in calls if isinstance(function, ast.Name) and function.id == "print"}


def test_src_has_no_bare_except():
    assert not {place for place, node in nodes(SOURCE) if isinstance(node, ast.ExceptHandler) and node.type is None}


def test_src_passes_no_strict_false():
    """Weights are loaded strictly, and sequences that are walked together have one length."""
    keywords = [
        (place, node) for place, node in nodes(SOURCE) if isinstance(node, ast.keyword) and node.arg == "strict"
    ]
    assert not {place for place, node in keywords if ast.unparse(node.value) == "False"}


def test_src_names_the_types_of_its_seams():
    arguments = [(place, node) for place, node in nodes(SOURCE) if isinstance(node, ast.arg) and node.arg in TYPED]
    assert arguments
    untyped = {
        f"{place}: {node.arg}" for place, node in arguments if node.annotation and ast.unparse(node.annotation) == "Any"
    }
    assert not untyped
