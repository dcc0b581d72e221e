"""Joins source files of the package into few files that need no package.

Whoever loads a checkpoint with `trust_remote_code=True` runs files that lie beside its weights. transformers takes
several that import each other by `from .name import`, diffusers takes one. So the files are put together here, from
the modules that define the classes, and from whatever these need of others.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_HEADER = '''"""{summary}

Made by lavit-hf from its own modules: change it there. License: Apache-2.0.
"""

from __future__ import annotations
'''


def bundle(path: Path) -> str:
    """Joins a module with what it imports from the package, and only with that.

    Args:
        path: A module whose relative imports name single definitions of other modules.

    Returns:
        The source of a module that needs none of them.

    Raises:
        ValueError: If a definition is missing, or two different ones have the same name.
    """
    return bundle_files([path], lambda _: path.stem)[path.stem]


def bundle_files(entries: Sequence[Path], file_of: Callable[[Path], str]) -> dict[str, str]:
    """Joins modules, and what they import from the package, into several files.

    Args:
        entries: Modules that are taken as a whole; of the others only what is needed.
        file_of: The file a module goes to, as a name without an ending.

    Returns:
        Sources by file; they import each other by `from .file import name`.

    Raises:
        ValueError: If a definition is missing, or two different ones have the same name in a file.
    """
    modules: dict[Path, _Module] = {}
    for path in entries:
        for statement in _load(path, modules).statements:
            _require(modules[path], statement, modules)
    starts = [*(modules[path] for path in entries), *modules.values()]  # the latter: what only functions import
    files: dict[str, list[_Module]] = {}
    for module in dict.fromkeys(found for start in starts for found in _in_order(start, modules)):
        files.setdefault(file_of(module.path), []).append(module)
    summaries = {file_of(path): modules[path].docstring for path in reversed(entries)}
    return {file: _join(file, members, summaries.get(file, ""), file_of) for file, members in files.items()}


class _Module:
    """The top-level statements of a source file.

    Attributes:
        imports: What names imported from other packages stand for: the module to import them from, if any, and the
            name there.
        siblings: The files that names imported from the package are defined in.
        statements: Everything but imports, docstring and `__all__`.
        required: Those that the bundle needs.
    """

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.docstring = ast.get_docstring(tree) or ""
        self.imports: dict[str, tuple[str, str]] = {}
        self.siblings: dict[str, Path] = {}
        self.statements: list[ast.stmt] = []
        self.required: set[ast.stmt] = set()
        self._lines = text.splitlines()
        self._starts: dict[ast.stmt, int] = {}
        self._top_level: set[str] = set()
        end = 0
        for statement in tree.body:
            self._sort(statement)
            self._starts[statement] = end
            end = statement.end_lineno or end

    def _sort(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ImportFrom) and statement.level:
            self._add_siblings(statement)
            self._top_level.update(alias.name for alias in statement.names)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            source = (statement.module or "") if isinstance(statement, ast.ImportFrom) else ""
            for alias in statement.names:
                bound = alias.asname or (alias.name if source else alias.name.partition(".")[0])
                renamed = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                self.imports[bound] = (source, renamed)
        elif isinstance(statement, ast.Expr) or _is_for_types(statement):
            return
        elif not _defined(statement):
            raise ValueError(f"{self.path.name}:{statement.lineno}: only imports and definitions can be taken along.")
        elif "__all__" not in _defined(statement):
            self.statements.append(statement)
            for inner in _inner_imports(statement):
                self._add_siblings(inner)

    def _add_siblings(self, statement: ast.ImportFrom) -> None:
        if statement.module is None or any(alias.asname for alias in statement.names):
            line = ast.unparse(statement)
            raise ValueError(f"{self.path.name}: import definitions by their names instead of `{line}`.")
        file = sibling_file(self.path, statement)
        self.siblings.update({alias.name: file for alias in statement.names})

    def definition(self, name: str) -> ast.stmt | None:
        return next((statement for statement in self.statements if name in _defined(statement)), None)

    def used_names(self) -> set[str]:
        return {name for statement in self.required for name in _used(statement)}

    def top_level_siblings(self) -> dict[str, Path]:
        """The imports that are needed when the module is imported, not when a function is called."""
        return {name: file for name, file in self.siblings.items() if name in self._top_level}

    def source(self, statement: ast.stmt, file_of: Callable[[Path], str]) -> str:
        """The statement with the comments above it; imports in its functions lead to the new files."""
        start, end = self._starts[statement], statement.end_lineno or 0
        lines = self._lines[start:end]
        for inner in reversed(_inner_imports(statement)):  # from the last on, which moves no other
            names = ", ".join(alias.name for alias in inner.names)
            new = f"{' ' * inner.col_offset}from .{file_of(sibling_file(self.path, inner))} import {names}"
            lines[inner.lineno - 1 - start : (inner.end_lineno or inner.lineno) - start] = [new]
        return "\n".join(lines).strip("\n")


def sibling_file(path: Path, statement: ast.ImportFrom) -> Path:
    """The file that a relative import of a module reads."""
    return path.parents[statement.level - 1].joinpath(*(statement.module or "").split(".")).with_suffix(".py")


def _load(path: Path, modules: dict[Path, _Module]) -> _Module:
    if path not in modules:
        modules[path] = _Module(path)
    return modules[path]


def _require(module: _Module, statement: ast.stmt, modules: dict[Path, _Module]) -> None:
    """Marks a statement and everything it refers to."""
    if statement in module.required:
        return
    module.required.add(statement)
    for name in _used(statement):
        owner = _load(module.siblings[name], modules) if name in module.siblings else module
        definition = owner.definition(name)
        if definition is not None:
            _require(owner, definition, modules)
        elif owner is not module:
            raise ValueError(f"{owner.path.name} does not define {name}.")


def _in_order(module: _Module, modules: dict[Path, _Module]) -> list[_Module]:
    """The modules, each after those that it imports from."""
    order: dict[Path, _Module] = {}
    for file in module.top_level_siblings().values():
        if file in modules:
            order.update({found.path: found for found in _in_order(modules[file], modules)})
    return list({**order, module.path: module}.values())


def _join(file: str, members: list[_Module], summary: str, file_of: Callable[[Path], str]) -> str:
    """The source of a file."""
    body: dict[str, str] = {}  # by what they define
    imports: dict[str, tuple[str, str]] = {}
    for module in members:
        for statement in module.statements:
            if statement in module.required:
                _add(body, ", ".join(sorted(_defined(statement))), module.source(statement, file_of), module.path)
        used = module.used_names()
        for name in sorted(used & module.imports.keys()):
            _add(imports, name, module.imports[name], module.path)
        for name, sibling in sorted(module.top_level_siblings().items()):
            if name in used and file_of(sibling) != file:
                _add(imports, name, (f".{file_of(sibling)}", name), module.path)
    if both := body.keys() & imports.keys():
        raise ValueError(f"{', '.join(sorted(both))}: imported in one module of {file}, defined in another.")
    header = _HEADER.format(summary=summary.partition("\n")[0])
    return "\n\n\n".join([f"{header}\n{_import_lines(imports.values())}", *body.values()]) + "\n"


def _add(found: dict, name: str, value: object, path: Path) -> None:
    if found.setdefault(name, value) != value:
        raise ValueError(f"{path.name}: another module that goes into the same file has another {name}; rename one.")


def _inner_imports(statement: ast.stmt) -> list[ast.ImportFrom]:
    """Imports from the package within functions, in the order of their lines."""
    found = [node for node in ast.walk(statement) if isinstance(node, ast.ImportFrom) and node.level]
    return sorted(found, key=lambda node: node.lineno)


def _used(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _is_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and _used(statement) >= {"TYPE_CHECKING"}


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return set()


def _import_lines(imports: Iterable[tuple[str, str]]) -> str:
    found = set(imports)
    lines = sorted(f"import {name}" for source, name in found if not source)
    for source in sorted({source for source, _ in found if source}, key=lambda source: (source[0] == ".", source)):
        lines.append(f"from {source} import {', '.join(sorted(name for s, name in found if s == source))}")
    return "\n".join(lines)
