"""Measures of units: in the whole model, or block by block."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from prunekit_kernels import Entropy
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.architectures import find_architecture
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.hidden_states import HiddenStatesFactory
from prunekit.models.sequential.weights import Weights
from prunekit.models.units.base import Kept
from prunekit.models.units.kinds import Kind
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.smaller_model import SmallerModel
from prunekit.runs.structured.unit_scores import TRUTH_TOKENS, first_tokens
from prunekit.structured.agreement import redundancy
from prunekit.structured.batches import Batch, eval_mode
from prunekit.structured.blockwise.block_passes import BlockPasses
from prunekit.structured.blockwise.scores import groups_in
from prunekit.structured.forward import WholeModel
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.probes.attention_entropy import head_entropies
from prunekit.structured.rankers import Ranker, rankers
from prunekit.structured.refit import reader_grams
from prunekit.structured.unit_gates import Gates


@dataclass
class UnitScorer(ABC):
    """Measures the units of a model.

    Attributes:
        model: The model.
        batches: Calibration batches of this rank; empty for a ranker without data.
        whole: Those of all ranks together.
        ranks: Processes that have the other batches.
    """

    model: PreTrainedModel
    batches: Sequence[Batch]
    whole: Sequence[Batch]
    ranks: Ranks

    @abstractmethod
    def gates(self, kind: Kind) -> Gates:
        """Attach gates to all units of a kind."""

    @abstractmethod
    def score(self, gates: Gates, ranker: Ranker) -> Scores:
        """Return the score of each unit."""

    @abstractmethod
    def truth(self, gates: Gates) -> Scores:
        """Return the loss without each unit, on a few tokens."""

    @abstractmethod
    def entropies(self, gates: Gates) -> dict[str, Entropy]:
        """Return the attention entropy of each head."""

    @abstractmethod
    def redundancy(self, gates: Gates) -> dict[str, Float[Tensor, "U U"]]:
        """Return the similarity of each pair of heads in the first batch."""

    @abstractmethod
    def remove(self, kind: Kind, kept: Kept) -> None:
        """Continue without the units that were removed from the model.

        Args:
            kind: Kind of the units.
            kept: Kept units of each group.
        """

    @abstractmethod
    def run(self, batch: Batch) -> None:
        """Run the model on one batch, for its hooks."""


@dataclass
class WholeModelScorer(UnitScorer):
    """Measures units in a model that is in memory."""

    @override
    def gates(self, kind: Kind) -> Gates:
        return Gates(self.model, kind)

    @override
    def score(self, gates: Gates, ranker: Ranker) -> Scores:
        return gates.score(ranker, [*self.batches] or None, ranks=self.ranks)

    @override
    def truth(self, gates: Gates) -> Scores:
        return gates.score("leave-one-out", first_tokens(self.whole, TRUTH_TOKENS))

    @override
    def entropies(self, gates: Gates) -> dict[str, Entropy]:
        return head_entropies(
            GatedModel(self.model, gates.linear_groups, gates.gates, self.batches, self.ranks)
        )

    @override
    def redundancy(self, gates: Gates) -> dict[str, Float[Tensor, "U U"]]:
        return gates.redundancy([self.batches[0]])

    @override
    def remove(self, kind: Kind, kept: Kept) -> None:
        """Do nothing: the model itself was changed."""

    @override
    def run(self, batch: Batch) -> None:
        with eval_mode(self.model):
            WholeModel(self.model).run(batch)


@dataclass
class BlockwiseScorer(UnitScorer):
    """Measures units with one block of weights in memory.

    Attributes:
        plan: The plan of the run.
        new_hidden_states: Makes empty storage for hidden states.
        removals: Kinds that were removed, each with its kept units.
        weights: Source of the weights.
    """

    model: PreTrainedModel = field(init=False)
    plan: StructuredPlan
    new_hidden_states: HiddenStatesFactory
    removals: list[tuple[Kind, dict[str, list[int]]]] = field(default_factory=list)
    weights: Weights = field(init=False)
    _smaller: SmallerModel = field(init=False)
    _redundancy: dict[str, Float[Tensor, "U U"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the model without weights."""
        self._open()

    def _open(self) -> None:
        plan = self.plan
        self._smaller = SmallerModel(plan, self.removals)
        self.model = self._smaller.model
        self.weights = Weights(self.model, self._smaller.checkpoint, plan.dtype, plan.device)

    def passes(self, batches: Sequence[Batch], ranks: Ranks = SINGLE) -> BlockPasses:
        """Return the passes over the blocks that the model has now."""
        return BlockPasses(
            self.model,
            stack_runners(self.model, find_architecture(self.model)),
            self.weights,
            batches,
            ranks,
            self.new_hidden_states,
        )

    @override
    def gates(self, kind: Kind) -> Gates:
        return Gates(self.model, kind, self.weights.device)

    @override
    def score(self, gates: Gates, ranker: Ranker) -> Scores:
        return self._score(gates, ranker, self.passes(self.batches, self.ranks))

    @override
    def truth(self, gates: Gates) -> Scores:
        few = first_tokens(self.whole, TRUTH_TOKENS)
        return self._score(gates, rankers()["leave-one-out"](), self.passes(few))

    def _score(self, gates: Gates, ranker: Ranker, passes: BlockPasses) -> Scores:
        scores = gates.score_blockwise(ranker, passes)
        self._smaller.tie()
        return scores

    @override
    def entropies(self, gates: Gates) -> dict[str, Entropy]:
        """As above; the similarity of heads is measured in the same pass."""
        found: dict[str, Entropy] = {}
        gated = GatedModel(self.model, gates.linear_groups, gates.gates, self.batches, self.ranks)
        for block in self.passes(self.batches, self.ranks).forward():
            groups = groups_in(gated.groups, block)
            if groups:
                view = replace(gated, groups=groups, part=block)
                found |= head_entropies(view)
                first = replace(view, batches=self.batches[:1], ranks=SINGLE)
                grams = reader_grams(first) if self.ranks.is_main else {}
                for group in groups if grams else ():
                    self._redundancy[group.name] = redundancy(group, grams[group.name])
        return found

    @override
    def redundancy(self, gates: Gates) -> dict[str, Float[Tensor, "U U"]]:
        return self._redundancy

    @override
    def remove(self, kind: Kind, kept: Kept) -> None:
        self.removals.append((kind, {name: [*units] for name, units in kept.items()}))
        self._open()

    @override
    def run(self, batch: Batch) -> None:
        for _ in self.passes([batch]).forward():
            pass
