"""Changes are made as a whole or not at all."""

from collections import OrderedDict

import pytest
from torch import nn

from prunekit.structured.snapshot import all_or_nothing, namespaces_of
from tests.support.architectures import tiny


class Holder:
    """An object with attributes of several kinds."""

    def __init__(self):
        self.number, self.names, self.table = 1, ["a"], OrderedDict(b=2)


def change(holder):
    holder.number, holder.added = 2, True
    holder.names.append("c")
    del holder.table["b"]
    holder.table = {}


def change_and_fail(holder):
    with all_or_nothing([vars(holder)]):
        change(holder)
        raise KeyboardInterrupt


def test_a_failure_restores_attributes_and_the_containers_themselves():
    holder = Holder()
    names, table = holder.names, holder.table
    with pytest.raises(KeyboardInterrupt):
        change_and_fail(holder)
    assert vars(holder) == {"number": 1, "names": ["a"], "table": {"b": 2}}
    assert holder.names is names
    assert holder.table is table


def test_without_a_failure_the_changes_remain():
    holder = Holder()
    with all_or_nothing([vars(holder)]):
        change(holder)
    assert vars(holder) == {"number": 2, "names": ["a", "c"], "table": {}, "added": True}


def cut_and_fail(model, handle):
    with all_or_nothing(namespaces_of(model)):
        handle.remove()
        del model.encoder.block[0]
        model.encoder.config.num_layers = 7
        model.config.added = 1
        model.shared.weight = nn.Parameter(model.shared.weight[:, :3])
        raise ZeroDivisionError


def test_modules_hooks_and_nested_configs_of_a_model_are_restored():
    model = tiny("t5")
    block, count = model.encoder.block[0], len([*model.parameters()])
    before = model.config.to_dict()
    handle = block.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        cut_and_fail(model, handle)
    assert model.encoder.block[0] is block
    assert len(block._forward_pre_hooks) == 1
    assert len([*model.parameters()]) == count
    assert model.shared.weight.shape[1] == 32
    assert model.config.to_dict() == before
    assert model.encoder.config.num_layers == 2
    handle.remove()
    assert not block._forward_pre_hooks
