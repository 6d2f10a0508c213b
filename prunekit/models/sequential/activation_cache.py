"""Cache of module outputs while a block is pruned stage by stage.

By stage, a block is run once for each stage of its linears, since the stages before it are pruned
by then. A module of it, such as its attention, is settled once all its linears are pruned: its
output for a batch does not change any more and is cached. If the module ends with its last linear,
only this linear has to run, on the cached input. So all stages and the propagation to the next
block cost about one and a half forwards, and one of attention.

Where the block only adds a module's output to the hidden states, and nothing else needs those, the
sums replace them (folding): then no memory is needed beside them.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.models.sequential.cached_module import CachedModule, ModuleTraits, Trace
from prunekit.models.sequential.hidden_states import HiddenStates, HiddenStatesFactory

Call = Callable[[], Float[Tensor, "B T D"]]


class ActivationCache:
    """Cached outputs of the settled modules of one block, for each batch.

    Args:
        block: The block, or a copy of it.
        stages: Paths of its linears that are pruned, in the order in which they run.
        new_hidden_states: Makes empty storage for cached tensors.
        traits: Facts about modules by their paths, filled in; a block and its copy share them.

    Attributes:
        stage: The stage being calibrated; those before it are pruned.
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        new_hidden_states: HiddenStatesFactory = list,
        traits: dict[str, ModuleTraits] | None = None,
    ) -> None:
        self.stage = 0
        traits = {} if traits is None else traits
        stage_of = {path: number for number, paths in enumerate(stages) for path in paths}
        self._linears = [block.get_submodule(path) for path in stage_of]
        modules: dict[str, CachedModule] = {}
        self._settled: list[list[CachedModule]] = []
        for stage in range(len(stages) + 1):
            paths = _settled_modules(block, stage_of, stage)
            for path in paths:
                if path not in modules:
                    last = _last_linear(path, stage_of)
                    modules[path] = CachedModule(
                        block.get_submodule(path),
                        block.get_submodule(last) if last else None,
                        new_hidden_states,
                        traits.setdefault(path, ModuleTraits()),
                    )
            self._settled.append([modules[path] for path in paths])

    def around(self, batch: int, hidden: Float[Tensor, "B T D"], call: Call) -> Call:
        """Return a call of the block that uses and fills the cache.

        Args:
            batch: Number of the batch.
            hidden: Input of the block.
            call: Runs the whole block on it.
        """

        def run() -> Tensor:
            settled = self._settled[self.stage]
            following = self._settled[self.stage + 1 :][:1]
            with ExitStack() as stack:
                for module in settled:
                    stack.enter_context(module.settled(batch, hidden))
                for module in following[0] if following else ():
                    if module not in settled:
                        stack.enter_context(module.before_last_stage(batch, hidden))
                return call()

        return run

    def settle_stage(self, hidden: HiddenStates | None = None) -> None:
        """Mark the current stage as pruned.

        Args:
            hidden: Inputs of the block, if outputs may be folded into them; changed in place.
        """
        self.stage += 1
        if hidden is not None and self.stage < len(self._settled) - 1:
            self.fold_into_hidden(hidden)

    @torch.no_grad()
    def probe_residual_adds(
        self, hidden: Float[Tensor, "B T D"], bind: Callable[[Tensor], Call]
    ) -> None:
        """Find modules whose output is only added to the hidden states.

        With the sum in place of the hidden states and zeros in place of a module's output, the
        block must have the same output and its other linears the same inputs. The output alone
        proves nothing for a block whose other modules output zeros.

        Args:
            hidden: Input of the block, of at least one sample; nothing may be settled yet.
            bind: Returns the call of the block on an input.
        """
        early, end = self._settled[-2:-1], self._settled[-1]
        modules = [module for settled in early for module in settled if module in end]
        if not modules:
            return
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(module.observed(0, hidden))
            expected = _trace(bind(hidden), self._linears)
        for module in modules:
            module.verify_residual_add(hidden, expected, lambda x: _trace(bind(x), self._linears))

    @torch.no_grad()
    def fold_into_hidden(self, hidden: HiddenStates) -> None:
        """Add outputs of settled modules to the hidden states, where equivalent.

        ``hidden``: inputs of the block, changed in place; nothing else may need them.
        """
        for module in self._settled[self.stage]:
            module.fold_into_hidden(hidden)


def _trace(call: Call, linears: Sequence[nn.Module]) -> Trace:
    """Return the inputs of linears in a call, and its output."""
    found: Trace = []
    with ExitStack() as stack:
        for linear in linears:
            hook = linear.register_forward_pre_hook(lambda at, x: found.append((at, x[0])))
            stack.callback(hook.remove)
        output = call()
    return [*found, (None, output)]


def _is_inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _settled_modules(block: nn.Module, stage_of: dict[str, int], stage: int) -> list[str]:
    """Return the largest modules with linears of earlier stages only."""
    found: list[str] = []

    def search(owner: nn.Module, prefix: str) -> None:
        for name, child in owner.named_children():
            path = prefix + name
            stages = [number for linear, number in stage_of.items() if _is_inside(linear, path)]
            if not stages or min(stages) >= stage:
                continue
            # A list of modules is not called itself, and a single linear is cheap to run.
            callable_ = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if max(stages) < stage and callable_ and path not in stage_of:
                found.append(path)
            else:
                search(child, f"{path}.")

    search(block, "")
    return found


def _last_linear(path: str, stage_of: dict[str, int]) -> str | None:
    """Return the linear of a module that is pruned last, if single."""
    inside = {linear: number for linear, number in stage_of.items() if _is_inside(linear, path)}
    final = [linear for linear, number in inside.items() if number == max(inside.values())]
    return final[0] if len(final) == 1 else None
