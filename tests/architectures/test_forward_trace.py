"""The traced forward: what reads the same tensor, which experts are called, what runs from ids."""

from prunekit.architectures.block_lists import BlockList
from prunekit.architectures.forward_trace import traced_forward
from tests.support.architectures import tiny


def test_linears_that_read_the_same_tensor_have_one_identity():
    with traced_forward(tiny("llama").base_model, BlockList("layers")) as trace:
        reads = trace.reads
    first = "layers.0.self_attn."
    assert reads[f"{first}q_proj"] == reads[f"{first}k_proj"] == reads[f"{first}v_proj"]
    assert reads[f"{first}o_proj"] != reads[f"{first}q_proj"]
    assert reads["layers.0.mlp.gate_proj"] == reads["layers.0.mlp.up_proj"]
    assert (trace.reads_ids, trace.chain.broken, trace.repeated) == (False, [], set())


def test_experts_that_are_called_and_their_routers_are_named():
    with traced_forward(tiny("qwen3_moe").base_model, BlockList("layers")) as trace:
        assert {*trace.experts} == {f"layers.{block}.mlp.experts" for block in (0, 1)}
        assert trace.routers == {f"layers.{block}.mlp.gate.weight" for block in (0, 1)}


def test_a_stack_is_traced_by_itself_on_what_the_stack_before_it_returns():
    base = tiny("bart").base_model
    with traced_forward(base, BlockList("encoder.layers", "encoder")) as trace:
        assert trace.features == 32
        assert not any(name.startswith("decoder") for name in trace.reads)
    with traced_forward(base, BlockList("decoder.layers", "decoder", "encoder"), 32) as trace:
        reads = trace.reads
    keys, queries = (
        (f"decoder.layers.{number}.encoder_attn.k_proj" for number in (0, 1)),
        [f"decoder.layers.{number}.encoder_attn.q_proj" for number in (0, 1)],
    )
    assert len({reads[name] for name in keys}) == 1
    assert len({reads[name] for name in queries}) == 2


def test_a_router_that_scales_the_tokens_of_experts_is_named():
    with traced_forward(tiny("llama4_text").base_model, BlockList("model.layers")) as trace:
        assert "model.layers.0.feed_forward.router.weight" in trace.routers
