"""``save_pretrained`` of a model with gates, which its weights do not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from prunekit.structured.gate_set import GateSet

ATTACHED = "_prunekit_gates"
"""Attribute of a model with the gates on it, by kind."""
NAME = "save_pretrained"


class GuardedSave:
    """Refuses to save a model whose gates change its output.

    An attribute of the model, so that a copy of the model has one of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._replaced: Callable[..., Any] | None = vars(model).get(NAME)

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Save the model, if its weights alone determine the output.

        Raises:
            ConfigError: A gate is not 1, and ``dense_saves`` of its gates is False.
        """
        for gates in vars(self._model).get(ATTACHED, {}).values():
            if not gates.dense_saves:
                _check_open(self._model, gates)
        if self._replaced is not None:
            return self._replaced(*args, **options)
        return getattr(type(self._model), NAME)(self._model, *args, **options)

    @classmethod
    def install(cls, model: PreTrainedModel) -> None:
        """Guard a model, unless it is guarded."""
        if not isinstance(vars(model).get(NAME), cls):
            vars(model)[NAME] = cls(model)

    @classmethod
    def remove(cls, model: PreTrainedModel) -> None:
        """Restore the method that was replaced, if any."""
        guard = vars(model).pop(NAME, None)
        if isinstance(guard, cls) and guard._replaced is not None:
            vars(model)[NAME] = guard._replaced


def _check_open(model: PreTrainedModel, gates: GateSet) -> None:
    changed = sum(int((gate.factor != 1).sum()) for gate in gates.gates.values())
    if not changed:
        return
    kind = gates.kind
    raise ConfigError(
        f"save_pretrained: {changed} gates on {kind} of {type(model).__name__} are not 1, and a "
        "checkpoint of its weights would be the dense model. For the smaller model call "
        f"{kind}.finalize() first. For a checkpoint to continue from, also by a Trainer, set "
        f"{kind}.dense_saves = True and write the gates beside it, with {kind}.save(file) (in a "
        f"Trainer: in on_save of a callback); {kind}.load(file) takes them up."
    )
