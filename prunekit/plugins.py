"""Discovery of plug-in classes: each file of a package adds one.

Other distributions add classes through entry points, whose group names are part of the public API.
"""

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
    """Import every module of a package, in name order; import errors propagate."""
    path = importlib.import_module(package).__path__
    for found in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        yield importlib.import_module(f"{package}.{found.name}")


@cache
def subclasses(package: str, base: type[T], group: str = "") -> tuple[type[T], ...]:
    """Return the concrete subclasses of ``base`` that a package defines.

    Args:
        package: Import path of the package.
        base: Base class; abstract subclasses are excluded.
        group: Entry-point group of classes from other distributions; ``package`` if empty.
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
    """Return the concrete subclasses by their ``name``, in name order.

    Args:
        package: Import path of the package.
        base: Base class; every subclass has a ``name``.
        group: Entry-point group of classes from other distributions; ``package`` if empty.
    """
    found = subclasses(package, base, group)
    return dict(sorted((kind.name, kind) for kind in found))  # pyright: ignore
