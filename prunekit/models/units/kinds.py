"""Kinds of units that can be taken out of a model whole, and what can make up for them."""

from typing import Literal, get_args

Kind = Literal["blocks", "hidden", "heads", "neurons"]
"""What a unit is; hidden: a coordinate of the residual stream."""

Compensation = Literal["none", "refit", "bias"]
"""What is done for the weights that stay."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""All of them, in the order in which they are taken out."""

WHOLE: frozenset[Kind] = frozenset({"blocks", "hidden"})
"""Those of which a config always has to say how many are left, and whose gates have to be open or
closed by then: no weight stands for a half-open one."""
