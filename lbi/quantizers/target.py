"""Where the function of a custom quantizer is: found, and read, without importing it.

The plan asks whether `module:function` is there and what its file holds, so that a misspelt
name costs nothing and an edited quantizer is another setting. Importing the module could
take seconds, want torch, or run anything at all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

WAY_OUT = "set quantizer.target=module:function, such as mypackage.mymodule:quantize"


def split(target: str) -> tuple[str, str] | None:
    """The module's dotted name and the function's; None for a text that is not `module:function`."""
    module, _, function = target.partition(":")
    whole = function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return (module, function) if whole else None


def source(target: str) -> Path | None:
    """The file of the target's module, in the current folder or on Python's path; None where there is none."""
    named = split(target)
    if named is None:
        return None
    first, *rest = named[0].split(".")
    spec = _top_level(first)
    for part in rest:
        # Asking for "a.b" by its whole name would import a.
        inside = list((spec.submodule_search_locations if spec else None) or [])
        spec = PathFinder.find_spec(part, inside) if inside else None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _top_level(name: str) -> ModuleSpec | None:
    """A module as it would be imported; last in the current folder, which `lbi` started as a script does not search."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        # A module that was made by hand (__main__ is one) has no spec.
        return None
    return spec or PathFinder.find_spec(name, [os.getcwd()])


def make_importable() -> None:
    """Let the current folder be searched, last, as `source` does."""
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    # A server that forks its children has looked into the folders before the file was there.
    importlib.invalidate_caches()


def content(target: str | None) -> str | None:
    """sha256 of the target's file; None where there is none. What the file itself imports is not followed."""
    file = source(target) if target else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else None


def why_not(target: str | None) -> str | None:
    """Why the target cannot be used, as far as its file tells; None if nothing speaks against it."""
    if target is None:
        return f"quantizer.target is not given: {WAY_OUT}"
    named = split(target)
    if named is None:
        return f"quantizer.target={target} does not name a function: {WAY_OUT}"
    file = source(target)
    if file is None:
        return f"quantizer.target={target}: there is no module {named[0]} in the current folder or on Python's path"
    if file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        return f"quantizer.target={target}: {file.name} is not valid Python: {error}"
    return None if _may_define(tree, named[1]) else f"quantizer.target={target}: {file.name} has no {named[1]}"


def _may_define(tree: ast.Module, name: str) -> bool:
    """Whether anything in the file could bind `name`; `import *` and a module's __getattr__ may bind any."""
    bound = {"*": False}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound[node.name] = True
        elif isinstance(node, ast.alias):
            bound[node.asname or node.name.partition(".")[0]] = True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound[node.id] = True
    return bound["*"] or "__getattr__" in bound or name in bound
