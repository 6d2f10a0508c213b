"""Forward and backward passes with one block of weights in memory.

Forward, the input of every block is kept where there is memory for it: on the device, in main
memory or on disk. Then the loss is computed, and the blocks are loaded again from the last to the
first, each run on its input and differentiated. All batches pass a block before the next one is
loaded, so that the weights are read twice, however many samples there are.

Shapes: B samples of a batch, T tokens, D features of the hidden states.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CheckpointError
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.hidden_states import HiddenStates, HiddenStatesFactory
from prunekit.models.sequential.pipeline import iterate_blocks, load_blocks
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.vocabulary import output_heads, vocabulary_modules
from prunekit.structured.batches import (
    Batch,
    is_causal,
    predicted_labels,
    prediction_logits,
    sample_losses,
)
from prunekit.structured.blockwise.block_forward import (
    ADVICE,
    BlockForward,
    BlockInputs,
    LossGradients,
)
from prunekit.structured.blockwise.outside_forward import OutsideForward, outputs_of
from prunekit.structured.blockwise.variants import Rest, Variant

HEAD_TOKENS = 256
"""Positions whose logits are computed at once; the float32 logits of a whole batch can be larger
than a block."""


@dataclass(frozen=True)
class BlockPasses:
    """Passes over the blocks of a model.

    Attributes:
        model: The model, in eval mode; empty if there are ``weights``.
        stacks: Its stacks, in run order.
        weights: Source of the weights, or None when the model has them.
        batches: Batches of this rank, without padding.
        ranks: Processes that have the other batches.
        new_hidden_states: Makes empty storage for the hidden states of all batches.
    """

    model: PreTrainedModel
    stacks: Sequence[StackRunner]
    weights: Weights | None
    batches: Sequence[Batch]
    ranks: Ranks = SINGLE
    new_hidden_states: HiddenStatesFactory = list

    def loaded(self) -> Iterator[BlockForward]:
        """Yield every block with its weights, without inputs."""
        count = sum(len(runner.blocks) for runner in self.stacks)
        for block in load_blocks(self.stacks, self.weights, range(count)):
            yield BlockForward(BlockInputs(block.runner, block.index, [], []), {})

    def outside(self) -> Iterator[OutsideForward]:
        """Yield the modules outside of the blocks, loaded, without inputs."""
        with self._vocabulary_loaded():
            yield OutsideForward(self._outside)

    def whole(self) -> Iterator[BlockForward]:
        """Yield the first block with its inputs; its variants reach the others."""
        kept, _ = self._keep_inputs()
        with loaded_weights(self.weights, kept[0].module):
            rest = Rest(self, kept)
            yield BlockForward(kept[0], self._numbers, mean_losses_after=rest.mean_losses)

    def forward(self) -> Iterator[BlockForward]:
        """Yield every block in run order, with its inputs."""
        numbers = self._numbers
        for block in self._blocks():
            inputs = BlockInputs(block.runner, block.index, block.hidden, block.contexts)
            yield BlockForward(inputs, numbers)

    def backward(
        self, norms: Collection[nn.Module] = ()
    ) -> Iterator[BlockForward | OutsideForward]:
        """Yield every block from the last, with inputs and loss gradients.

        Args:
            norms: Norms of the stream. If any, what lies outside of the blocks is yielded too,
                where it comes in this order.

        Raises:
            ConfigError: Labels are missing, or do not fit the shape of the logits.
            CheckpointError: Gradients flow between blocks in other ways than by hidden states: keys
                that later blocks share, or an encoder's output that is changed before the decoder's
                blocks read it; or a norm of the stream lies outside of the blocks and is not the
                final one of its stack.
        """
        final = self._final_norms(norms)
        kept, (hidden, contexts) = self._keep_inputs()
        norm = final.get(self.stacks[-1])
        loss = self._loss_gradients(hidden, contexts, norm)
        numbers, rest = self._numbers, Rest(self, kept)
        if norm:
            modules = self._outside.difference(final.values()) | {norm}
            with self._vocabulary_loaded():
                yield OutsideForward(modules, norm, hidden, loss.by_norm, loss.predictions, numbers)
        del hidden
        for runner, blocks in groupby(reversed(kept), key=lambda each: each.runner):
            if runner is not self.stacks[-1]:
                yield from self._enter_encoder(runner, kept, loss, final.get(runner))
            for inputs in blocks:
                with loaded_weights(self.weights, inputs.module):
                    block = BlockForward(inputs, numbers, loss, rest.mean_losses)
                    yield block
                    if inputs is not kept[0]:
                        block.propagate()

    @property
    def _numbers(self) -> Mapping[int, int]:
        return {id(batch): number for number, batch in enumerate(self.batches)}

    @property
    def _outside(self) -> frozenset[nn.Module]:
        """Modules outside of all blocks."""
        blocks = [block for runner in self.stacks for block in runner.blocks]
        inside = {module for block in blocks for module in block.modules()}
        return frozenset(self.model.modules()) - inside

    def _vocabulary_loaded(self) -> AbstractContextManager[None]:
        tables = vocabulary_modules(self.model, [runner.module for runner in self.stacks])
        return loaded_weights(self.weights, *tables)

    def _final_norms(self, norms: Collection[nn.Module]) -> dict[StackRunner, nn.Module]:
        """Return the norm at the end of each stack."""
        found = {}
        outside = self._outside.intersection(norms)
        for runner in self.stacks:
            own = outside.intersection(runner.module.modules())
            outside -= own
            if len(own) > 1:
                outside |= own
            for norm in own:
                found[runner] = norm
        if outside:
            names = sorted(name for name, each in self.model.named_modules() if each in outside)
            raise CheckpointError(
                f"{' and '.join(names)}: a stack has one norm of its hidden states outside of the "
                "blocks, at its end, that can be run by itself. Choose the ranker magnitude, which "
                "runs none."
            )
        return found

    def _blocks(self) -> Iterator[Any]:
        return iterate_blocks(
            self.model,
            self.stacks,
            self.weights,
            self.batches,
            self.ranks,
            new_hidden_states=self.new_hidden_states,
        )

    def _keep_inputs(self) -> tuple[list[BlockInputs], tuple[HiddenStates, Sequence[Context]]]:
        """Return the inputs of each block, and of the head."""
        kept, block = [], None
        for block in self._blocks():
            hidden = self.new_hidden_states()
            hidden.extend(map(torch.clone, block.hidden))
            kept.append(BlockInputs(block.runner, block.index, hidden, block.contexts))
        assert block is not None
        return kept, (block.hidden, block.contexts)

    def _loss_gradients(
        self, hidden: HiddenStates, contexts: Sequence[Context], norm: nn.Module | None
    ) -> LossGradients:
        """Return the loss gradients by the outputs of last block and norm."""
        found = LossGradients(self.new_hidden_states(), self.new_hidden_states(), [])
        with loaded_weights(self.weights, *output_heads(self.model)):
            for batch, states, context in zip(self.batches, hidden, contexts, strict=True):
                gradient = torch.zeros_like(states)
                by_norm = torch.zeros_like(states) if norm else None
                predictions = states.new_zeros(len(states), dtype=torch.float32)
                for part, labels in self._predicted_parts(batch, states.shape[1]):
                    leaf = states[:, part].detach().requires_grad_()
                    with outputs_of(norm) as outputs:
                        loss, count = self._losses(leaf, context, labels)
                    gradients = torch.autograd.grad(loss.sum(), [leaf, *outputs])
                    gradient[:, part] = gradients[0]
                    if by_norm is not None:
                        by_norm[:, part] = gradients[1]
                    predictions = predictions + count
                found.by_output.extend([gradient])
                found.by_norm.extend([] if by_norm is None else [by_norm])
                found.predictions.append(predictions)
        return found

    def _predicted_parts(self, batch: Batch, tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield ranges of positions with their labels.

        Heads of other models than causal ones may read all positions at once.
        """
        labels = predicted_labels(self.model, batch)
        if not is_causal(self.model):
            yield slice(0, tokens), labels
            return
        for start in range(0, tokens - 1, HEAD_TOKENS):
            part = slice(start, min(start + HEAD_TOKENS, tokens - 1))
            yield part, labels[:, part]

    def _losses(
        self, hidden: Float[Tensor, "B T D"], context: Context, labels: Tensor
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the summed loss and the number of predictions of each sample."""
        logits = self.stacks[-1].head(hidden, context)
        if not is_causal(self.model):
            logits = prediction_logits(self.model, logits, labels)
        return sample_losses(logits, labels)

    def mean_losses(self, variants: Sequence[Variant]) -> list[float]:
        """Return the mean loss for each variant of the head's input."""
        sums = []
        with loaded_weights(self.weights, *output_heads(self.model)), torch.no_grad():
            for variant in variants:
                with variant.gates:
                    sums.append(self._summed_loss(variant))
        every = self.ranks.all_gather_object(sums)
        return [
            sum(total for total, _ in each) / max(sum(count for _, count in each), 1.0)
            for each in zip(*every, strict=True)
        ]

    def _summed_loss(self, variant: Variant) -> tuple[float, float]:
        """Return the summed loss of all batches, and their number of predictions."""
        total = count = 0.0
        parts = zip(self.batches, variant.hidden, variant.contexts, strict=True)
        for batch, states, context in parts:
            for part, labels in self._predicted_parts(batch, states.shape[1]):
                loss, predictions = self._losses(states[:, part], context, labels)
                total += float(loss.double().sum())
                count += float(predictions.sum())
        return total, count

    def _enter_encoder(
        self,
        runner: StackRunner,
        kept: Sequence[BlockInputs],
        loss: LossGradients,
        norm: nn.Module | None,
    ) -> Iterator[OutsideForward]:
        """Propagate gradients from the encoder's output to its last block's.

        The encoder's final norm is yielded, if there is one.
        """
        if len(loss.by_encoded) < len(self.batches):
            raise CheckpointError(
                f"{type(self.model).__name__}: it changes the output of its encoder before the "
                f"decoder's blocks read it, and gradients are not followed through that. {ADVICE}"
            )
        last = next(each for each in reversed(kept) if each.runner is runner)
        with loaded_weights(self.weights, last.module):
            outputs = last.outputs(self.new_hidden_states())
        if norm:
            by_norm = [loss.by_encoded[number] for number in range(len(self.batches))]
            yield OutsideForward(
                frozenset({norm}), norm, outputs, by_norm, loss.predictions, self._numbers
            )
        for number, (states, context) in enumerate(zip(outputs, last.contexts, strict=True)):
            leaf = states.detach().requires_grad_()
            encoded = runner.finish(leaf, context)
            (gradient,) = torch.autograd.grad(encoded, leaf, loss.by_encoded.pop(number))
            outputs[number] = gradient
        loss.by_output, loss.by_input = outputs, self.new_hidden_states()
