"""The record of a pruned linear: keys and order of the report."""

import torch

from prunekit.models.layout import Linear
from prunekit.sparsify.layer_result import LayerResult

LINEAR = Linear("model.layers.0.mlp.up_proj", "mlp.up_proj", 8, 4)
PLAIN = {"sparsity": 0.5, "relative_error": 0.25, "seconds": 2.0}


def test_a_plain_linear_has_five_keys():
    record = LayerResult(LINEAR, torch.ones(8, 4), **PLAIN).as_record()
    assert [*record.items()] == [
        ("name", LINEAR.name),
        ("shape", [8, 4]),
        ("sparsity", 0.5),
        ("relative_error", 0.25),
        ("seconds", 2.0),
    ]


def test_further_keys_are_in_the_order_of_the_report():
    result = LayerResult(
        LINEAR,
        torch.ones(8, 4),
        **PLAIN,
        tokens=3,
        starved=None,
        pattern="3:4",
        facts={"damping": 0.1},
        recovery={"recovered_error": None},
    )
    record = result.as_record()
    keys = "name shape sparsity relative_error tokens starved pattern seconds damping"
    assert [*record] == [*keys.split(), "recovered_error"]
    assert record["starved"] is None
