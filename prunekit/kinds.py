"""Kinds of units that can be taken out of a model whole, and what can make up for them."""

from typing import Literal, get_args

Kind = Literal["heads", "neurons"]
"""What a unit is."""

Compensation = Literal["none", "refit"]
"""What is done for the weights that stay."""

KINDS: tuple[Kind, ...] = get_args(Kind)
