"""Layouts of fused experts: every linear is found again as it was put in."""

import itertools

import pytest
import torch
from torch import nn

from prunekit.architectures.expert_layout import (
    KNOWN,
    ExpertLayout,
    expert_layout,
    fused_experts,
    is_list,
)
from tests.support.architectures import OWN_EXPERTS, tiny

NAMES = ("gated", "transposed", "interleaved", "biased")
LAYOUTS = [
    ExpertLayout(**dict(zip(NAMES, flags, strict=True)))
    for flags in itertools.product([False, True], repeat=4)
]
EXPERTS, OUTPUTS, INPUTS = 3, 4, 5


def fuse(layout, linears):
    """Return a fused tensor [E, O, I] or [E, I, O] of linears [E, O, I]."""
    joined = torch.stack(linears, 2).flatten(1, 2) if layout.interleaved else torch.cat(linears, 1)
    return joined.transpose(1, 2) if layout.transposed else joined


def module_of(layout):
    """Return a module with the flags of transformers, and its linears by fused tensor."""
    module, linears = nn.Module(), {}
    module.has_gate, module.is_transposed = layout.gated, layout.transposed
    module.is_concatenated, module.has_bias = not layout.interleaved, layout.biased
    for fused, names in layout.parts.items():
        linears[fused] = {name: torch.randn(EXPERTS, OUTPUTS, INPUTS) for name in names}
        setattr(module, fused, nn.Parameter(fuse(layout, [*linears[fused].values()])))
        if layout.biased:
            size = OUTPUTS * len(names)
            setattr(module, f"{fused}_bias", nn.Parameter(torch.randn(EXPERTS, size)))
    return module, linears


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_linear_of_each_expert_is_a_view_of_the_fused_tensor(layout):
    module, linears = module_of(layout)
    assert expert_layout(module) == layout
    assert fused_experts(nn.ModuleDict({"experts": module})) == {"experts": layout}
    for fused, named in linears.items():
        whole = getattr(module, fused).data
        for expert in range(EXPERTS):
            found = layout.weights(fused, whole[expert])
            assert {*found} == {*named}
            for name, weight in found.items():
                assert torch.equal(weight, named[name][expert])
                weight.zero_()
        assert not bool(whole.any())


def test_flags_without_tensors_or_tensors_without_flags_are_no_experts():
    module, _ = module_of(LAYOUTS[-1])
    del module.down_proj_bias
    assert fused_experts(nn.ModuleDict({"experts": module})) == {}
    del module.has_bias
    assert expert_layout(module) is None
    assert expert_layout(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("model_type", OWN_EXPERTS)
def test_modules_outside_of_the_interface_are_known_by_class(model_type):
    found = fused_experts(tiny(model_type).base_model)
    assert found
    assert {layout.call for layout in found.values()} <= {"routed", "grouped"}
    model = tiny(model_type).base_model
    for path, layout in found.items():
        module = model.get_submodule(path)
        assert layout in KNOWN.values()
        assert layout.count(module) == 4
        for fused, linears in layout.parts.items():
            matrix = layout.matrices(module, fused)[3]
            assert {*layout.weights(fused, matrix)} == {*linears}
            for weight in layout.weights(fused, matrix).values():
                assert sorted(weight.shape) == [16, 32]


def test_a_list_of_experts_is_known_by_its_name():
    modules = dict(tiny("switch_transformers").named_modules())
    lists = [name for name, module in modules.items() if is_list(module)]
    assert lists == [f"{side}.block.1.layer.{at}.mlp.experts" for side, at in SIDES]


SIDES = (("encoder", 1), ("decoder", 2))
