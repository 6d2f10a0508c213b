"""The traced forward: what reads the same tensor, which experts are called, what runs from ids."""

from prunekit.architectures.forward_trace import traced_forward
from tests.support.architectures import tiny


def test_linears_that_read_the_same_tensor_have_one_identity():
    with traced_forward(tiny("llama").base_model, "layers") as trace:
        reads = trace.reads
    first = "layers.0.self_attn."
    assert reads[f"{first}q_proj"] == reads[f"{first}k_proj"] == reads[f"{first}v_proj"]
    assert reads[f"{first}o_proj"] != reads[f"{first}q_proj"]
    assert reads["layers.0.mlp.gate_proj"] == reads["layers.0.mlp.up_proj"]
    assert (trace.reads_ids, trace.broken, trace.repeated) == (False, [], set())


def test_experts_that_are_called_and_their_routers_are_named():
    with traced_forward(tiny("qwen3_moe").base_model, "layers") as trace:
        assert {*trace.experts} == {f"layers.{block}.mlp.experts" for block in (0, 1)}
        assert trace.routers == {f"layers.{block}.mlp.gate.weight" for block in (0, 1)}
