"""Inspection of sparsity and patterns of the matrices in a checkpoint."""

import torch

from prunekit.evaluation.inspect import inspect
from tests.support import checkpoints


def test_finds_sparsity_dtype_and_pattern_of_each_matrix(tmp_path):
    folder = checkpoints.write(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"

    def keep_two_of_four(weight):
        weight.unflatten(1, (-1, 4))[..., :2] = 0

    checkpoints.change(folder, name, keep_two_of_four)
    matrices = {matrix["name"]: matrix for matrix in inspect(folder)}
    assert matrices[name] == {
        "name": name,
        "shape": [64, 32],
        "dtype": "bfloat16",
        "sparsity": 0.5,
        "n_of_m": "2:4",
        "format": "dense",
    }
    assert matrices["model.embed_tokens.weight"]["n_of_m"] is None
    assert "model.norm.weight" not in matrices


def test_the_sparsest_pattern_that_holds_is_named(tmp_path):
    groups = {"1:4": [1, 0, 0, 0], "4:8": [1, 1, 1, 0, 0, 0, 0, 1], "1:8": [0] * 7 + [1]}
    tensors = {name: torch.tensor(row).float().repeat(3, 4) for name, row in groups.items()}
    tensors["none"] = torch.tensor([0, 1, 1, 1.0]).repeat(3, 2)
    tensors["odd"] = torch.tensor([[0, 1, 1.0]])
    folder = checkpoints.write(tmp_path)
    checkpoints.save(folder, tensors)
    assert {tensor["name"]: tensor["n_of_m"] for tensor in inspect(folder)} == {
        **{name: name for name in groups},
        "none": None,
        "odd": None,
    }


def test_types_of_eight_bits_are_counted_and_smaller_ones_left_out(tmp_path):
    folder = checkpoints.write(tmp_path)
    eight = torch.tensor([[0, 1.0, 0, 2]]).to(torch.float8_e4m3fn)
    four = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    checkpoints.save(folder, {"eight": eight, "four": four, "complex": torch.zeros(2, 2).cfloat()})
    (found,) = inspect(folder)
    assert (found["name"], found["dtype"], found["sparsity"]) == ("eight", "float8_e4m3fn", 0.5)
