"""Notes about weights that no run prunes."""

from types import SimpleNamespace

from torch import nn

from prunekit.architectures import find_architecture
from prunekit.models.dense_weights import dense_notes, outside_note
from prunekit.models.layout import stack_runners
from tests.support.architectures import tiny


def block():
    return nn.ModuleDict({"linear": nn.Linear(2, 2), "mix": nn.Conv1d(2, 3, 3)})


def test_matrices_outside_of_linears_are_one_note_for_all_blocks():
    runner = SimpleNamespace(names=["layers.0", "layers.1"], blocks=[block(), block()])
    assert [*dense_notes([runner])] == [
        "layers.*.mix.weight stays dense: its module, Conv1d, is no linear."
    ]


def test_linears_outside_of_the_blocks_are_named_but_not_the_head():
    model = tiny("llama")
    runners = stack_runners(model, find_architecture(model))
    assert [*outside_note(model, runners)] == []
    model.projector = nn.Linear(2, 2)
    assert [*outside_note(model, runners)] == ["projector stays dense: outside of the blocks."]
    assert [*dense_notes(runners)] == []
