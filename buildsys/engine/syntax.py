"""A module's syntax tree as a digest, and what the module imports. Parses; executes nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

KERNEL_MARK = "INTERCHANGEABLE_KERNEL"
RULE_TABLE = "RULE"
COMPUTED = frozenset({"import_module", "__import__", "iter_modules", "walk_packages"})
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def describe(source: bytes, place: str, name: str) -> Json:
    """What `code.RuleCode` keeps of a module: tree, imports, kernel, computed."""
    tree = ast.parse(source, place)
    kernel = any(_assigns(node, KERNEL_MARK) for node in tree.body)
    tree.body = [node for node in tree.body if not _assigns(node, RULE_TABLE)]
    package = name if place.endswith("/__init__.py") else name.rpartition(".")[0]
    nodes = list(_running(tree))
    words: list[str] = []
    _write(tree, words)
    return {
        "tree": blake3("\0".join(words).encode(errors="surrogatepass")).hexdigest(),
        "imports": sorted({each for node in nodes for each in _imported(node, package)}),
        "kernel": kernel,
        "computed": any(_name_of(node) in COMPUTED for node in nodes),
    }


def _assigns(node: ast.AST, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and _name_of(node.test) == "TYPE_CHECKING"


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not _is_for_types(child):
            yield from _running(child)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Modules that a statement imports, their packages included (they are executed too)."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _write(node: ast.AST, words: list[str]) -> None:
    """The tree as words. What is absent or empty is left out, so that fields which a later
    Python adds (type parameters) change nothing."""
    words.append(type(node).__name__)
    for field, value in ast.iter_fields(node):
        if field in ("type_comment", "ctx") or value is None or value == []:
            continue
        words.append(field)
        if field == "body" and isinstance(node, DEFINITIONS):
            value = [each for each in _without_docstring(value) if not _is_for_types(each)]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                _write(each, words)
            else:
                words.append(repr(each))
    words.append(")")


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *rest]:
            return rest
    return body
