"""Discovery of plug-in classes in packages and entry points."""

import sys

import pytest

from prunekit import patterns, plugins
from prunekit.allocations import allocations
from prunekit.methods import Method, Scored, methods
from prunekit.patterns import Pattern
from prunekit.patterns.n_of_m import NOfM
from prunekit.patterns.tiles import Tiles
from prunekit.patterns.unstructured import Unstructured

MODULE = """
from abc import abstractmethod

from prunekit.methods import Scored
from prunekit.patterns import Pattern


class Smallest(Scored):
    name = "another.smallest"

    def score(self, layer):
        return -layer.weight.abs()


class Unfinished(Scored):
    name = "unfinished"

    @abstractmethod
    def missing(self): ...


class Checkers(Pattern):
    name = spelling = "checkers"
    stride = None

    @classmethod
    def parse(cls, text, scope):
        return cls() if text == "checkers" else None

    def keep(self, score, sparsity):
        raise NotImplementedError
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a distribution that declares a class as an entry point."""
    (tmp_path / "another_pruner.py").write_text(MODULE)
    folder = tmp_path / "another_pruner-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: another-pruner\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)

    def install(group, kind):
        declared = f"[{group}]\nanything = another_pruner:{kind}\n"
        (folder / "entry_points.txt").write_text(declared)
        plugins.subclasses.cache_clear()

    yield install
    plugins.subclasses.cache_clear()
    sys.modules.pop("another_pruner", None)


def test_each_file_of_a_folder_adds_its_classes():
    assert list(methods()) == ["admm", "alps", "magnitude", "random", "ria", "sparsegpt", "wanda"]
    assert list(allocations()) == ["curves", "global", "owl", "uniform"]
    assert set(plugins.subclasses("prunekit.patterns", Pattern)) == {NOfM, Tiles, Unstructured}


def test_base_classes_are_not_found():
    found = plugins.subclasses("prunekit.methods", Method)
    assert Method not in found
    assert Scored not in found


def test_a_class_is_found_once_though_other_files_import_it(tmp_path, monkeypatch):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text("class First(Exception): ...")
    (folder / "second.py").write_text(
        "from package.first import First\nclass Second(First): ...\nunrelated = int"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = plugins.subclasses("package", Exception)
    assert [kind.__name__ for kind in found] == ["First", "Second"]


def test_a_file_that_cannot_be_imported_is_not_silent(tmp_path, monkeypatch):
    folder = tmp_path / "broken_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "broken.py").write_text("import a_module_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nobody_has"):
        plugins.subclasses("broken_package", Exception)


def test_modules_come_in_name_order():
    names = [module.__name__ for module in plugins.modules("prunekit.allocations")]
    files = ("base", "curves", "global_", "owl", "schedules", "uniform")
    assert names == [f"prunekit.allocations.{name}" for name in files]


def test_another_distribution_adds_a_method(installed):
    installed("prunekit.methods", "Smallest")
    assert methods()["another.smallest"].__module__ == "another_pruner"
    assert list(methods()) == sorted(methods())
    assert "wanda" in methods()


def test_a_method_in_the_group_of_allocations_adds_nothing(installed):
    installed("prunekit.allocations", "Smallest")
    assert "another.smallest" not in methods()
    assert list(allocations()) == ["curves", "global", "owl", "uniform"]


def test_an_unfinished_class_adds_nothing(installed):
    installed("prunekit.methods", "Unfinished")
    assert "unfinished" not in methods()


def test_another_distribution_adds_a_pattern(installed):
    installed("prunekit.patterns", "Checkers")
    assert type(patterns.parse("checkers")).__module__ == "another_pruner"
    assert "checkers" in patterns.spellings()
    assert isinstance(patterns.parse("2:4"), NOfM)


def test_an_entry_point_that_cannot_be_imported_is_not_silent(installed):
    installed("prunekit.methods", "Absent")
    with pytest.raises(AttributeError, match="Absent"):
        methods()
