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
def subclasses(package: str, base: type[T]) -> tuple[type[T], ...]:
    """Return the concrete subclasses of ``base`` that the files of ``package`` define.

    Other distributions add theirs through the entry point group of the same name.
    """
    found = [
        kind
        for module in modules(package)
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__
    ]
    found += [entry.load() for entry in entry_points(group=package)]
    return tuple(kind for kind in found if issubclass(kind, base) and not inspect.isabstract(kind))


def by_name(package: str, base: type[T]) -> dict[str, type[T]]:
    """Return the same by the ``name`` of each class, in name order."""
    return dict(sorted((kind.name, kind) for kind in subclasses(package, base)))  # pyright: ignore
