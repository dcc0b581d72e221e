"""Self-contained copies of the pipeline and of the token decoder, for users without this package.

diffusers loads a class that it does not know from a Python file beside its weights, and fetches only this one file. So
each is made of the module that defines the class and of whatever that needs from other modules here.
"""

from __future__ import annotations

import ast
from pathlib import Path

PIPELINE_MODULE = "pipeline_lavit_pixel_decoder"
PIPELINE_CLASS = "LavitPixelDecoderPipeline"
TOKEN_DECODER = "token_decoder"
TOKEN_DECODER_MODULE = "lavit_token_decoder"
TOKEN_DECODER_CLASS = "LavitTokenDecoder"

_PACKAGE = Path(__file__).resolve().parents[1]
_HEADER = '''"""{summary}

Made by lavit-hf from its own modules: change it there. License: Apache-2.0.
"""

from __future__ import annotations
'''


def pipeline_code() -> str:
    """The pipeline as one file."""
    return bundle(_PACKAGE / "pipelines" / f"{PIPELINE_MODULE}.py")


def token_decoder_code() -> str:
    """The token decoder as one file."""
    return bundle(_PACKAGE / "modeling" / "modeling_lavit_token_decoder.py")


def write_code(folder: Path) -> None:
    """Writes both files into the directory of a pixel decoder."""
    (folder / f"{PIPELINE_MODULE}.py").write_text(pipeline_code(), encoding="utf-8")
    (folder / TOKEN_DECODER / f"{TOKEN_DECODER_MODULE}.py").write_text(token_decoder_code(), encoding="utf-8")


def bundle(path: Path) -> str:
    """Joins a module with what it imports from its siblings, and only with that.

    Args:
        path: A module whose relative imports name single definitions of modules in the same folder.

    Returns:
        The source of a module that needs none of them.
    """
    main = _Module(path)
    modules = {path: main}
    for statement in main.statements:
        _require(main, statement, modules)
    body: list[str] = []
    imports: set[tuple[str, str]] = set()
    for module in _in_order(main, modules):
        body += [module.source(statement) for statement in module.statements if statement in module.required]
        imports |= {module.imports[name] for name in module.used_names() & module.imports.keys()}
    header = _HEADER.format(summary=main.docstring.partition("\n")[0])
    return "\n\n\n".join([f"{header}\n{_import_lines(imports)}", *body]) + "\n"


class _Module:
    """The top-level statements of a source file.

    Attributes:
        imports: What names imported from other packages stand for: the module to import them from, if any, and the
            name there.
        siblings: The files that names imported from siblings are defined in.
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
        end = 0
        for statement in tree.body:
            self._sort(statement)
            self._starts[statement] = end
            end = statement.end_lineno or end

    def _sort(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ImportFrom) and statement.level:
            file = self.path.parent / f"{statement.module}.py"
            self.siblings.update({alias.name: file for alias in statement.names})
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            source = (statement.module or "") if isinstance(statement, ast.ImportFrom) else ""
            for alias in statement.names:
                bound = alias.asname or (alias.name if source else alias.name.partition(".")[0])
                renamed = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                self.imports[bound] = (source, renamed)
        elif not isinstance(statement, ast.Expr) and "__all__" not in _defined(statement):
            self.statements.append(statement)

    def definition(self, name: str) -> ast.stmt | None:
        return next((statement for statement in self.statements if name in _defined(statement)), None)

    def used_names(self) -> set[str]:
        return {name for statement in self.required for name in _used(statement)}

    def source(self, statement: ast.stmt) -> str:
        """The statement with the comments above it."""
        return "\n".join(self._lines[self._starts[statement] : statement.end_lineno]).strip("\n")


def _require(module: _Module, statement: ast.stmt, modules: dict[Path, _Module]) -> None:
    """Marks a statement and everything it refers to."""
    if statement in module.required:
        return
    module.required.add(statement)
    for name in _used(statement):
        owner = module
        if name in module.siblings:
            file = module.siblings[name]
            owner = modules.setdefault(file, modules.get(file) or _Module(file))
        definition = owner.definition(name)
        if definition is not None:
            _require(owner, definition, modules)
        elif owner is not module:
            raise ValueError(f"{owner.path.name} does not define {name}.")


def _in_order(module: _Module, modules: dict[Path, _Module]) -> list[_Module]:
    """The modules, each after those that it imports from."""
    order: dict[Path, _Module] = {}
    for file in module.siblings.values():
        if file in modules:
            order.update({found.path: found for found in _in_order(modules[file], modules)})
    return list({**order, module.path: module}.values())


def _used(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return set()


def _import_lines(imports: set[tuple[str, str]]) -> str:
    lines = sorted(f"import {name}" for source, name in imports if not source)
    for source in sorted({source for source, _ in imports if source}):
        lines.append(f"from {source} import {', '.join(sorted(n for s, n in imports if s == source))}")
    return "\n".join(lines)
