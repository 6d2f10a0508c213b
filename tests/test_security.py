"""SECURITY.md: each promise names tests that exist."""

import ast
import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / ".github/SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


def test_each_promise_names_a_test():
    promised = TEXT.split("## What we promise")[1].split("## What we do not promise")[0]
    promises = re.split(r"^\*\*", promised, flags=re.MULTILINE)[1:]
    assert len(promises) >= 8
    assert all("- `tests/" in promise for promise in promises)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_named_test_exists(file, name):
    found = ast.parse((ROOT / file).read_text()).body
    assert name in {node.name for node in found if isinstance(node, ast.FunctionDef)}
