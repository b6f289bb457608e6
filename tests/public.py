"""The public names, read from the source without importing it: where each is defined and what stands with it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Module


@cache
def tree(path: Path) -> ast.Module:
    """A file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_file(module: str) -> Path:
    """Where a module lies."""
    path = SRC.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(path: Path) -> str:
    """And back."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rooms() -> list[str]:
    """Every package that says which of its names are public."""
    found = [path for path in sorted(SRC.rglob("__init__.py")) if declared(path)]
    return [module_of(path) for path in found]


def declared(path: Path) -> list[str]:
    """`__all__`."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@dataclass(frozen=True)
class Public:
    """A public name."""

    name: str
    room: str
    """The first package that exports it."""
    file: Path
    node: Definition
    doc: str
    """Its docstring; of a constant or an alias the string behind it."""

    def __str__(self) -> str:
        return f"{self.room}.{self.name}"

    @property
    def parts(self) -> list[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
        """Itself if it is a function; a class and its public methods: name, node and docstring of each."""
        if isinstance(self.node, ast.FunctionDef):
            return [(self.name, self.node, self.doc)]
        if not isinstance(self.node, ast.ClassDef):
            return []
        inside = [
            node
            for node in self.node.body
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name in ("__init__", "__call__"))
        ]
        methods = [(f"{self.name}.{node.name}", node, ast.get_docstring(node) or "") for node in inside]
        return [(self.name, self.node, self.doc), *methods]


def _define(module: str, name: str) -> tuple[Path, Definition, str]:
    """The definition of a name that a module has, wherever it is from."""
    path = module_file(module)
    body = tree(path).body
    nested = [inner for node in body if isinstance(node, ast.If) for inner in node.body]
    for place, node in enumerate([*body, *nested]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            overloaded = any(getattr(d, "id", None) == "overload" for d in node.decorator_list)
            if not overloaded:
                return path, node, ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if getattr(target, "id", None) == name:
                return path, node, _string_behind(body, place)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    if module_file(f"{node.module}.{alias.name}").exists():
                        file = module_file(f"{node.module}.{alias.name}")
                        return file, tree(file), ast.get_docstring(tree(file)) or ""
                    return _define(node.module, alias.name)
    raise LookupError(f"{module} exports {name}, and does not define it")


def _string_behind(body: list[ast.stmt], place: int) -> str:
    behind = body[place + 1] if place + 1 < len(body) else None
    if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str):
        return behind.value.value
    return ""


@cache
def names() -> tuple[Public, ...]:
    """Every public name, once, under the first room that has it; the front page's come first."""
    found: dict[tuple[Path, str], Public] = {}
    for room in rooms():
        for name in declared(module_file(room)):
            file, node, doc = _define(room, name)
            found.setdefault((file, name), Public(name, room, file, node, doc))
    return tuple(found.values())


# What stands in it. ---------------------------------------------------------------------------------------------------


def own_raises(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """The errors that a function raises itself, or a class as it is made; not what is called by them."""
    if isinstance(node, ast.ClassDef):
        made = ("__post_init__",)
        return set().union(*(own_raises(n) for n in node.body if isinstance(n, ast.FunctionDef) and n.name in made), set())
    raised: set[str] = set()
    for inner in _own(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and isinstance(inner.exc.func, ast.Name):
            raised.add(inner.exc.func.id)
    return {name for name in raised if re.fullmatch(r"\w+(Error|Warning)", name)}


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.AsyncFunctionDef):
            yield child
            yield from _own(child)


def bare_tensors(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Arguments, fields and results that are tensors of which no shape is said."""
    annotations: list[tuple[str, ast.expr | None]] = []
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations += [(a.arg, a.annotation) for a in arguments]
        annotations += [("returns", node.returns)]
    else:
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        annotations += [(n.target.id, n.annotation) for n in fields if not n.target.id.startswith("_")]  # type: ignore[union-attr]
    return [name for name, annotation in annotations if annotation is not None and _bare(annotation)]


SHAPED = {"Float", "Int", "Integer", "Bool", "Shaped", "Num", "Real", "Inexact", "Int64", "UInt8"}


def _bare(annotation: ast.AST) -> bool:
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", None) in (*SHAPED, "dict", "Mapping"):
        return False  # tensors by name differ in shape
    if isinstance(annotation, ast.Name) and annotation.id == "Tensor":
        return True
    return any(_bare(child) for child in ast.iter_child_nodes(annotation))


def quantities(node: ast.FunctionDef | ast.ClassDef, doc: str) -> Iterator[tuple[str, str]]:
    """Arguments and fields with what is said of each; the whole docstring, where nothing is said of one alone."""
    if isinstance(node, ast.FunctionDef):
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            yield argument.arg, _said_of(argument.arg, doc)
        return
    for place, inner in enumerate(node.body):
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name) and not inner.target.id.startswith("_"):
            yield inner.target.id, _string_behind(node.body, place) or doc


def _said_of(argument: str, doc: str) -> str:
    found = re.search(rf"^\s+{argument}: (.*?)(?=^\s+\w+: |^\w+:|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else doc


@cache
def words_used() -> frozenset[str]:
    """Every name that the tests and the examples call something by."""
    found: set[str] = set()
    for folder in ("tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= words(tree(path))
    return frozenset(found)


def words(node: ast.AST) -> set[str]:
    """Every name and attribute in some code; what is only imported is not used."""
    return {
        inner.id if isinstance(inner, ast.Name) else inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name | ast.Attribute)
    }


@cache
def _callers() -> tuple[tuple[str, frozenset[str], Path], ...]:
    """Of every definition at the top of a module: its name, the names in it, and its room."""
    found: list[tuple[str, frozenset[str], Path]] = []
    for path in sorted(SRC.rglob("*.py")):
        for node in tree(path).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            name = getattr(node, "name", None) or getattr(target, "id", None)
            if name:
                found.append((name, frozenset(words(node) | _quoted(node)), path.parent))
    return tuple(found)


def _quoted(node: ast.AST) -> set[str]:
    """Annotations that stand in quotes."""
    return {
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier()
    }


def reached(seen: set[str]) -> set[str]:
    """`seen`, and what is named by a definition that is seen: in the same room, or in a public one's own definition."""
    seen = set(seen)
    own = {(name.name, name.file.parent) for name in names()}
    homes: dict[str, set[Path]] = {}
    for name in names():
        homes.setdefault(name.name, set()).add(name.file.parent)
    while True:
        more = {
            word
            for name, inside, room in _callers()
            if name in seen
            for word in inside
            if word not in seen
            and (word in homes or word.startswith("_"))
            and ((name, room) in own or room in homes.get(word, {room}))
        }
        if not more:
            return seen
        seen |= more
