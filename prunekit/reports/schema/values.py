"""Types of the values of a report.

JSON has neither infinity nor NaN: they are the strings "inf", "-inf" and "nan".
"""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat


def _is_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("names a file outside of the folder")
    return name


LARGEST_FLOAT32 = 3.4e38

Text = Annotated[str, Field(min_length=1)]
Number = FiniteFloat | Literal["inf", "-inf", "nan"]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Answer = Annotated[float, Field(ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)]
PatternName = Annotated[str, Field(max_length=100)]
Matrix = list[list[FiniteFloat]]
FileName = Annotated[str, AfterValidator(_is_inside)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    """A table of a report, with strict types.

    Numbers are not read from strings, nor counts from booleans.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


def check_unique(names: Iterable[str]) -> None:
    """Refuse a name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name} is listed twice")
        seen.add(name)


def is_square(matrix: Sequence[Sequence[object]], size: int) -> bool:
    """Return whether a matrix has this many rows and columns."""
    return len(matrix) == size and all(len(row) == size for row in matrix)
