"""The statements of a TOML text with their lines.

They are found in one pass, without parsing values. tomllib recurses for each bracket and takes time
quadratic in the parts of a dotted key, so both are limited here before it reads a text.
"""

import re
from collections.abc import Iterator

NESTING_LIMIT = 16
"""Levels of tables, arrays and dotted keys within one statement."""


class NestingError(ValueError):
    """A statement is nested too deeply.

    Attributes:
        line: The line where that was found.
    """

    def __init__(self, line: int) -> None:
        super().__init__(f"tables, arrays and dotted keys nest more than {NESTING_LIMIT} deep")
        self.line = line


# Strings and comments are matched whole; an unterminated long string reaches to the end of the
# text. The quantifiers are possessive, so that the search is linear in any text.
_TOKEN = re.compile(
    r'"""(?:[^"\\]++|\\.|"{1,2}(?!"))*+(?:"{3,5}|\Z)'
    r"|'''(?:[^']++|'{1,2}(?!'))*+(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]++|\\.)*+"'
    r"|'[^'\n]*+'"
    r"|\#[^\n]*+"
    r"|[\[\]{}.,\n]",
    re.DOTALL,
)


def statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each statement.

    A statement is a header, or a key with its value. If the text is not TOML, the statements may be
    wrong, but the check of the nesting is not.

    Raises:
        NestingError: A statement is nested too deeply.
    """
    first, line, start = 1, 1, 0
    depth, opened = 0, [0]
    for token in _TOKEN.finditer(text):
        line += token[0].count("\n")
        if token[0] == "\n" and len(opened) == 1:
            if statement := text[start : token.start()].strip():
                yield first, statement
            first, start, depth = line, token.end(), 0
        else:
            depth = _depth_after(token[0], depth, opened)
        if depth > NESTING_LIMIT:
            raise NestingError(line)
    if statement := text[start:].strip():
        yield first, statement


def _depth_after(token: str, depth: int, opened: list[int]) -> int:
    """Return the nesting depth after a token.

    ``opened`` holds the depth inside each open bracket.
    """
    if token == ".":
        return depth + 1
    if token in {"[", "{"}:
        opened.append(depth + 1)
    elif token in {"]", "}"} and len(opened) > 1:
        return opened.pop() - 1
    # After a bracket or a comma the parts of a key before it no longer count.
    return opened[-1] if token in {"[", "{", ","} else depth
