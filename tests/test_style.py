"""Style that no linter holds: short first lines of docstrings, short files and functions."""

import ast
import re

import pytest

from tests.conftest import ROOT

MOST_WORDS, MOST_LINES, MOST_LINES_OF_FUNCTION = 12, 300, 50
FILES = sorted([*(ROOT / "prunekit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
LONG_KERNELS = {"part_kernel", "count_kernel"}
"""Kernels that are one loop each."""


def plain_words(line):
    """Return the words of a sentence, without code, formulas and what is in parentheses."""
    said = re.sub(r"``.*?``|\([^()]*\)", "", line)
    return [word for word in said.split() if re.search("[A-Za-z]", word)]


def is_compiled(node):
    """Return whether Triton compiles a function, whose text is then part of its identity."""
    return any("jit" in ast.unparse(each) for each in getattr(node, "decorator_list", ()))


@pytest.mark.parametrize("package", ["prunekit", "kernels"])
def test_first_lines_of_docstrings_have_at_most_twelve_words(package):
    long = []
    for file in FILES:
        if not file.is_relative_to(ROOT / package):
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and not is_compiled(
                node
            ):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(plain_words(first)) > MOST_WORDS:
                    long.append(f"{file.relative_to(ROOT)}: {first}")
    assert not long, "\n".join(long)


def test_files_and_functions_fit_a_screen():
    long = []
    for file in FILES:
        text = file.read_text("utf-8")
        if text.count("\n") > MOST_LINES:
            long.append(str(file))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in LONG_KERNELS:
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION:
                    long.append(f"{file}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_words_are_counted_without_code_and_references():
    line = "Return ``a + b`` of the rows (Sun et al., eq. 1), in nats."
    assert plain_words(line) == ["Return", "of", "the", "rows", "in", "nats."]
