"""Finds what the files of a folder define: adding a method or a pattern is adding one file."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def modules(package: str) -> Iterator[ModuleType]:
    """Import every module of ``package``, in name order; an import error is not caught."""
    path = importlib.import_module(package).__path__
    for found in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        yield importlib.import_module(f"{package}.{found.name}")


@cache
def subclasses(package: str, base: type[T], group: str = "") -> tuple[type[T], ...]:
    """Return the concrete subclasses of ``base`` defined in the files of a package.

    Args:
        package: Import path of the package.
        base: Class that they derive from.
        group: Entry-point group through which other distributions add theirs; the package's
            import path if empty.
    """
    found = [
        kind
        for module in modules(package)
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__
    ]
    found += [entry.load() for entry in entry_points(group=group or package)]
    return tuple(kind for kind in found if issubclass(kind, base) and not inspect.isabstract(kind))


def by_name(package: str, base: type[T], group: str = "") -> dict[str, type[T]]:
    """Return the subclasses by the ``name`` of each, in name order; see :func:`subclasses`."""
    found = subclasses(package, base, group)
    return dict(sorted((kind.name, kind) for kind in found))  # pyright: ignore
