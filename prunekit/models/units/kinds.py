"""Kinds of removable units and of compensation."""

from typing import Literal, get_args

Kind = Literal["blocks", "hidden", "experts", "heads", "neurons"]
"""Kind of a unit; hidden: a coordinate of the residual stream."""

Compensation = Literal["none", "refit", "bias"]
"""How the kept weights are adjusted for the removed units."""

Counted = Literal["model", "blocks"]
"""Which parameters a budget counts: all, or those of the blocks."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds, in the order of removal."""

WHOLE: frozenset[Kind] = frozenset({"blocks", "hidden", "experts"})
"""Kinds whose remaining number the config always has to state. Their gates must be fully open or
closed by then, as no weight can absorb a factor between 0 and 1."""

NUMBERED: tuple[Kind, ...] = ("blocks", "experts")
"""Kinds whose units are numbered in the names of tensors."""
