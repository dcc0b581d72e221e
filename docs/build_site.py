"""Hooks of mkdocs: the home page is README, and the reference has a page for each module of public names.

Links that lead out of `docs/`, to files of the repository, become plain text: the site holds no source.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_PAGES = (
    "tutorial.md",
    "usage.md",
    "conversion.md",
    "training.md",
    "scale.md",
    "performance.md",
    "evaluation.md",
    "metrics.md",
    "publishing.md",
)  # these first
_REFERENCE = {
    "Models, processors, pipelines": "lavit_hf",
    "Training": "lavit_hf.training",
    "Evaluation": "lavit_hf.evaluation",
    "Publishing": "lavit_hf.hub",
    "Scenes": "lavit_hf.data.scenes",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_NAME = re.compile(r"\[<code>~?([\w.]+)</code>\]")  # as docstrings of transformers refer to others


def on_config(config: Any) -> Any:
    """Puts pages in order."""
    found = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    others = [name for name in found if name not in _PAGES]
    reference = [{title: _reference_page(module)} for title, module in _REFERENCE.items()]
    config["nav"] = [{"lavit-hf": "index.md"}, *_PAGES, *others, {"Reference": reference}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds README and the reference."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for title, module in _REFERENCE.items():
        content = f"# {title}\n\n`from {module} import ...`\n\n" + "\n".join(_directives(module))
        files.append(File.generated(config, _reference_page(module), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Keeps the text alone of links to files that are not on the site."""

    def replace(match: re.Match[str]) -> str:
        _, text, target = match.groups()
        path, _, _ = target.partition("#")
        is_known = not path or "://" in path or files.get_file_from_path(path) is not None
        return match.group() if is_known else text

    return _LINK.sub(replace, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Links names in docstrings to their place in the reference; those of other libraries are only set as code."""

    def replace(match: re.Match[str]) -> str:
        name, _, member = match.group(1).partition(".")
        code = f"<code>{match.group(1)}</code>"
        if name not in _places():
            return code
        module, place = _places()[name]
        url = f"../{Path(_reference_page(module)).stem}/#{place}" + (f".{member}" if member else "")
        return f'<a href="{url}">{code}</a>'

    return _NAME.sub(replace, html) if page.file.src_uri.startswith("reference/") else html


@cache
def _places() -> dict[str, tuple[str, str]]:
    """The module that exports a public name, and where it is defined."""
    places: dict[str, tuple[str, str]] = {}
    for module in _REFERENCE.values():
        package = importlib.import_module(module)
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isclass(found) or inspect.isfunction(found):
                places.setdefault(name, (module, f"{found.__module__}.{found.__qualname__}"))
    return places


def _reference_page(module: str) -> str:
    return f"reference/{module.removeprefix('lavit_hf.').replace('.', '-')}.md"


def _directives(module: str) -> Iterator[str]:
    """What mkdocstrings is told: where each public name is defined that no page before has shown."""
    return (f"::: {place}\n" for exporter, place in _places().values() if exporter == module)
