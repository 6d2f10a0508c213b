"""Stages of experts, and linears that are optional in a block."""

from prunekit.architectures import Stack, Stage

STACK = Stack(
    blocks="layers",
    stages=(
        Stage("q", "k"),
        Stage("mlp.experts.*.gate", "mlp.experts.*.up"),
        Stage("mlp.experts.*.down"),
        Stage("o"),
    ),
    optional=frozenset({"q", "mlp.experts.*.down"}),
)


def test_a_stage_of_experts_names_their_module():
    assert [stage.experts for stage in STACK.stages] == [None, "mlp.experts", "mlp.experts", None]
    assert STACK.experts == ["mlp.experts"]
    assert STACK.stages[1].for_expert(7) == Stage("mlp.experts.7.gate", "mlp.experts.7.up")


def test_stages_of_a_block_list_all_stages_of_one_expert_after_another():
    modules = ["q", "mlp.experts", "mlp.experts.10", "mlp.experts.2", "mlp.experts.2.gate"]
    assert STACK.stages_of(0, modules) == [
        Stage("q", "k"),
        Stage("mlp.experts.2.gate", "mlp.experts.2.up"),
        Stage("mlp.experts.2.down"),
        Stage("mlp.experts.10.gate", "mlp.experts.10.up"),
        Stage("mlp.experts.10.down"),
        Stage("o"),
    ]


def test_stages_of_a_block_without_experts_are_unchanged():
    assert STACK.stages_of(0, ["q", "k", "o"]) == [*STACK.stages]


def test_optional_linears_of_experts_are_optional_for_each_expert():
    assert STACK.is_optional("q")
    assert not STACK.is_optional("k")
    assert STACK.is_optional("mlp.experts.3.down")
    assert not STACK.is_optional("mlp.experts.3.up")
