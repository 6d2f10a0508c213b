"""Teachers of a model: a frozen copy, or itself.

A teacher runs without gradients. Hooks on the modules of a :class:`SharedTeacher`, which are the
student's, tell its forward by ``torch.is_grad_enabled()``, as it is False.

Shapes: B samples, T tokens, D features of the hidden states.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures.adapters import bare_model
from prunekit.errors import ConfigError
from prunekit.models.units.blocks import BlockGroup, BlockOutput, block_groups
from prunekit.structured.batches import Batch, eval_mode
from prunekit.structured.gate_set import GateSet
from prunekit.structured.guarded_save import ATTACHED


class TeacherOutputs(NamedTuple):
    """Outputs of a teacher for a batch, without gradients.

    Attributes:
        hidden: Hidden states after each of the blocks that were asked for.
        logits: The logits, as the model returns them.
    """

    hidden: list[Float[Tensor, "B T D"]]
    logits: Tensor


class Teacher(Protocol):
    """A model whose outputs another one is trained towards.

    Attributes:
        model: The model that runs.
        stacks: Its blocks.
    """

    model: PreTrainedModel
    stacks: Sequence[BlockGroup]

    def outputs(self, batch: Batch, blocks: Sequence[nn.Module]) -> TeacherOutputs:
        """Run a batch; ``blocks`` are those whose hidden states are returned."""
        ...

    def refresh(self) -> None:
        """Learn from the student, whose held-out loss has improved."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the values that this teacher has beside the student's, by name."""
        ...


class DenseTeacher:
    """A frozen copy of a model.

    Make it before the model is pruned. The copy has no gates, so that all units take part; it never
    changes.

    Attributes:
        model: The copy.
        stacks: Its blocks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Copy a model, with the adapters that it has."""
        self.model = deepcopy(model)
        for gates in [*vars(bare_model(self.model)).get(ATTACHED, {}).values()]:
            gates.detach()
        self.model.requires_grad_(requires_grad=False)
        self.model.eval()
        self.stacks: Sequence[BlockGroup] = block_groups(bare_model(self.model))

    @torch.no_grad()
    def outputs(self, batch: Batch, blocks: Sequence[nn.Module]) -> TeacherOutputs:
        """Run a batch; ``blocks`` are those whose hidden states are returned."""
        return _outputs(self.model, batch, blocks)

    def refresh(self) -> None:
        """Do nothing: the copy is fixed."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the copy, by name."""
        return {name: value.detach() for name, value in self.model.named_parameters()}


class SharedTeacher:
    """The student itself with open gates and earlier trained values.

    The frozen weights are shared, so that no second model is in memory. For the time of a forward
    the copies take the places of the trained parameters. These are neither changed nor copied then,
    so that a graph of the student, gradients and their hooks are not affected.

    Attributes:
        model: The student.
        stacks: Its blocks.
        gates: The gates that are open for the teacher.
    """

    def __init__(self, model: PreTrainedModel, gates: Sequence[GateSet] = ()) -> None:
        """Copy the trained values.

        Args:
            model: The student, possibly with adapters of peft.
            gates: Gates on its units.

        Raises:
            ConfigError: No parameter of the model is trained.
        """
        self.model, self.gates = model, gates
        self.stacks: Sequence[BlockGroup] = block_groups(bare_model(model))
        self._copies: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self.refresh()
        if not self._copies:
            raise ConfigError(
                "distill: no parameter of the model is trained, so none is distilled."
            )

    @torch.no_grad()
    def outputs(self, batch: Batch, blocks: Sequence[nn.Module]) -> TeacherOutputs:
        """Run a batch; ``blocks`` are those whose hidden states are returned."""
        with eval_mode(self.model), self._in_place():
            return _outputs(self.model, batch, blocks)

    def refresh(self) -> None:
        """Copy the student's trained values."""
        copies: dict[nn.Parameter, nn.Parameter] = {}
        places = {}
        for module, name, value in _trained(self.model):
            if value not in copies:
                copies[value] = _frozen(value.detach().clone())
            places[module, name] = copies[value]
        self._copies = places

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies, by the name of the student's parameter."""
        return {name: copy.detach() for name, copy in self._named()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the copies to values that :meth:`tensors` returned.

        Raises:
            ConfigError: They are of other parameters.
        """
        copies = dict(self._named())
        if differ := sorted(copies.keys() ^ tensors.keys()):
            raise ConfigError(
                f"distill: the state of the teacher is of another model: {differ[0]}."
            )
        loaded = {
            copy: _frozen(tensors[name].to(copy.device, copy=True)) for name, copy in copies.items()
        }
        self._copies = {place: loaded[copy] for place, copy in self._copies.items()}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each copy once, with the name of the student's parameter."""
        names = {module: path for path, module in self.model.named_modules()}
        seen = set()
        for (module, name), copy in self._copies.items():
            if copy not in seen:
                seen.add(copy)
                yield f"{names[module]}.{name}".lstrip("."), copy

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Replace trained parameters by the copies, and open the gates."""
        gates = [gate for each in self.gates for gate in each.gates.values()]
        parameters = {place: _parameter(place) for place in self._copies}
        states = [(gate, gate.value, gate.keep) for gate in gates]
        try:
            for (module, name), copy in self._copies.items():
                module._parameters[name] = copy
            for gate in gates:
                gate.keep = torch.ones_like(gate.keep)
                gate.value = gate.keep.float()
            yield
        finally:
            for (module, name), parameter in parameters.items():
                module._parameters[name] = parameter
            for gate, value, keep in states:
                gate.value, gate.keep = value, keep


@contextmanager
def recorded_outputs(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the hidden states after blocks, within the context, by block."""
    found: dict[nn.Module, Tensor] = {}

    def record(block: nn.Module, _: object, output: BlockOutput) -> None:
        found[block] = output if isinstance(output, Tensor) else output[0]

    # Hooks run in the order in which they were added, so after the gates of blocks.
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(record).remove)
        yield found


def _outputs(model: PreTrainedModel, batch: Batch, blocks: Sequence[nn.Module]) -> TeacherOutputs:
    with recorded_outputs(blocks) as hidden:
        logits = model(**batch).logits
    return TeacherOutputs([hidden[block] for block in blocks], logits)


def _trained(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the places of trained parameters; tied ones have several."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.requires_grad:
                yield module, name, value


def _parameter(place: tuple[nn.Module, str]) -> nn.Parameter:
    module, name = place
    value = module._parameters[name]
    assert value is not None
    return value


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
