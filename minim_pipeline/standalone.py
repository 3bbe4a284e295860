"""The pipeline as one file, `pipeline.py`, so that a published model loads where the package is not installed.

diffusers runs such a file on `custom_pipeline=` and `trust_remote_code=True`. It is made from the package's own
modules each time a pipeline is saved: imports first, then their lines as they stand.
"""

import ast
import functools
import hashlib
import re
from pathlib import Path

from . import __version__


# In the order in which they need each other.
MODULES = (
    "notices modalities captions tokens data/image_pixels licenses turns schedules lora minim_filter/estimate"
    " minim_filter/filter_head minim_filter/fingerprints minim_filter/funnel minim_filter/selection minim_filter/seeds"
    " minim_filter/filtering call_checks saving pipeline_output pipeline_minim"
).split()

# diffusers looks for a component's class beside its weights, and for the pipeline's at the top.
PIPELINE_FILE, COMPONENT_FILE = "pipeline.py", "filter_head/minim_filter.py"

# Its beginning: what a module of the package knows by its place in it, this file has to find out by itself.
HEAD = Path(__file__).with_name("standalone_head.txt")
PROLOGUE_IMPORTS = ("import sys", "import diffusers", "from pathlib import Path")
PROLOGUE_NAMES = {"FILTER_LIBRARY", "source_code"}


@functools.cache
def source_code() -> str:
    """The text of `pipeline.py`, which imports nothing of this package.

    Raises ValueError if two modules define the same name, or one needs another that is not among `MODULES`.
    """
    folder = Path(__file__).parent
    return inline({name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES})


def inline(modules: dict[str, str]) -> str:
    """One file of the sources of modules, by name, that import from each other; raises as `source_code`."""
    imports: dict[str, tuple[str, str]] = {}  # by the name bound: module, and what is imported of it
    owners: dict[str, str] = dict.fromkeys(PROLOGUE_NAMES, "the prologue")
    for node in ast.parse("\n".join(PROLOGUE_IMPORTS)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            add_imports(node, imports, owners, "the prologue")
    sections = []
    for name, text in modules.items():
        tree, lines = ast.parse(text), text.splitlines()
        docstring = tree.body[0] if ast.get_docstring(tree) else None
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                check_known(node, owners, name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                add_imports(node, imports, owners, name)
            elif node is not docstring and not registers(node):
                for defined in names_of(node):
                    if owners.setdefault(defined, name) != name:
                        raise ValueError(f"{defined!r} is defined in {name} and in {owners[defined]}: rename one.")
                continue
            blank(lines, node)
        body = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")
        sections.append(f"\n\n# {'-' * 20} {name}.py {'-' * 20}\n\n\n{body}\n")
    body = "".join(sections)
    version = f"{__version__}_{hashlib.sha256(body.encode()).hexdigest()[:12]}".replace(".", "_")
    files = {"pipeline": PIPELINE_FILE, "component": COMPONENT_FILE}
    head = HEAD.read_text(encoding="utf-8")
    return head.format(package=__version__, version=version, imports=import_statements(imports), **files) + body


def add_imports(node: ast.Import | ast.ImportFrom, imports: dict, owners: dict, name: str) -> None:
    """Notes where each name that an import binds comes from."""
    for alias in node.names:
        renamed = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
        origin = (node.module, renamed) if isinstance(node, ast.ImportFrom) else ("", renamed)
        bound = alias.asname or (alias.name if origin[0] else alias.name.partition(".")[0])
        if imports.setdefault(bound, origin) != origin or bound in owners:
            raise ValueError(f"{bound!r}, which {name} imports, is something else in another module: rename one.")


def import_statements(imports: dict[str, tuple[str, str]]) -> str:
    """One statement for each module that is imported, and one for each from which names are."""
    whole = [f"import {what}\n" for module, what in sorted(set(imports.values())) if not module]
    parts = []
    for module in sorted({module for module, _ in imports.values()} - {""}):
        names = sorted(what for origin, what in imports.values() if origin == module)
        line = f"from {module} import {', '.join(names)}\n"
        if len(line) > 120:
            line = f"from {module} import (\n" + "".join(f"    {what},\n" for what in names) + ")\n"
        parts.append(line)
    return "".join(whole + parts)


def check_known(node: ast.ImportFrom, owners: dict, name: str) -> None:
    for alias in node.names:
        if alias.asname or alias.name not in owners:
            raise ValueError(f"{name} imports {alias.name!r} from .{node.module}, which is not above it in one file.")


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]


def registers(node: ast.stmt) -> bool:
    """Whether it gives diffusers a class, which is the package's to do: `diffusers.Name = Name`."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)


def blank(lines: list[str], node: ast.stmt) -> None:
    """Empties a statement's lines, and those of the comment right above it."""
    first = node.lineno - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    last = node.end_lineno or node.lineno
    lines[first:last] = [""] * (last - first)
