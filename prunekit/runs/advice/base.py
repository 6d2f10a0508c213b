"""What advice is given on, and what it consists of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.structured_table import StructuredPrune
from prunekit.models.layout import is_causal_language_model
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.sparsify.plan import WeightsPlan

Goal = Literal["quality", "speed", "memory"]
Change = Mapping[str, object]
"""New values by dotted key of the config; None removes a key."""


@dataclass(frozen=True)
class Subject:
    """A config and what is known of its model.

    Attributes:
        config: The config.
        goal: What the user wants most; None if that was not said.
        shapes: Outputs and inputs of each linear that is pruned; empty if units are.
        writes_text: Whether the model is a causal language model.
    """

    config: Config | StructuredConfig
    goal: Goal | None = None
    shapes: Sequence[tuple[int, int]] = ()
    writes_text: bool = True

    @classmethod
    def of(cls, plan: PlanBase, goal: Goal | None = None) -> Self:
        """Return the subject of a plan.

        Args:
            plan: The plan of a single run.
            goal: What the user wants most.
        """
        pruned = plan.linears if isinstance(plan, WeightsPlan) else []
        shapes = [(each.outputs, each.inputs) for each in pruned if each.skipped is None]
        return cls(plan.config, goal, shapes, is_causal_language_model(plan.model, plan.stacks))

    @property
    def units(self) -> StructuredPrune | None:
        """The table ``[prune]`` of a run that removes units, or None."""
        prune = self.config.prune
        return prune if isinstance(prune, StructuredPrune) else None


@dataclass(frozen=True)
class Advice:
    """A choice of a config than which another is better.

    Attributes:
        key: Dotted key of the choice.
        text: What is better, and why.
        change: Keys that follow it; empty if the user has to decide.
        rule: Id of the rule, set by :func:`prunekit.runs.advice.rules.advise`.
    """

    key: str
    text: str
    change: Change = field(default_factory=dict)
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


Rule = Callable[[Subject], Iterator[Advice]]
"""Yields at most one piece of advice; none where the rule is followed or does not apply."""
