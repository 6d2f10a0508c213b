"""Structured runs that are refused before any weight is read."""

import json

import pytest
import torch

from prunekit.errors import ConfigError, ShapeError
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.structured import finished, planned


@pytest.mark.parametrize(
    ("model_type", "prune", "error", "message"),
    [
        (
            "gpt2",
            'method = "random"\npattern = "heads"\nsparsity = 0.5\nuniform = true',
            ShapeError,
            "hidden size divided by the number of heads",
        ),
        (
            "gpt2",
            'method = "random"\npattern = "hidden"\nsparsity = 0.5',
            ShapeError,
            "normalise with LayerNorm",
        ),
        (
            "llama",
            'method = "random"\npattern = "neurons"\nparameters = 0.1',
            ConfigError,
            "parameters: 10.0 % cannot be had",
        ),
        (
            "llama",
            'method = "random"\npattern = "neurons"\nsparsity = 0.5\nround_to = 64',
            ConfigError,
            r"neurons stay in multiples of 64, by .* no layer has more than 64",
        ),
        (
            "llama",
            'method = "random"\npattern = "hidden"\nsparsity = 0.1\nround_to = 16',
            ConfigError,
            "of 32 hidden 0.1 prunes none",
        ),
        (
            "llama",
            'method = "random"\npattern = "heads"\nsparsity = 0.01',
            ConfigError,
            "of 8 heads 0.01 prunes none",
        ),
        (
            "llama",
            'method = "random"\npattern = "blocks"\nsparsity = 0.5\ncompensate = "refit"',
            ConfigError,
            "to be removed; none are",
        ),
        (
            "llama",
            'method = "flap"\npattern = "neurons"\nsparsity = 0.5\ncompensate = "bias"',
            ConfigError,
            '"bias" needs one in model.layers.0.mlp.down_proj, and LlamaForCausalLM',
        ),
        (
            "llama",
            'method = "random"\npattern = "heads"\nsparsity = 0.25\nuniform = true',
            ShapeError,
            "num_attention_heads = 3",
        ),
        (
            "llama",
            'method = "random"\npattern = "heads"\nsparsity = 0.9',
            ConfigError,
            "with those that each layer keeps",
        ),
        (
            "llama",
            'method = "random"\npattern = "heads"\nsparsity = 0.5\nleast = 5',
            ConfigError,
            "only 0 can",
        ),
        (
            "bert",
            'method = "gradient"\npattern = "heads"\nsparsity = 0.5',
            ConfigError,
            "gradient asks how well the model predicts",
        ),
        (
            "t5",
            'method = "hybrid"\npattern = "heads"\nsparsity = 0.5',
            ConfigError,
            "surgeon asks how well",
        ),
    ],
)
def test_the_plan_refuses_what_cannot_work(tmp_path, model_type, prune, error, message):
    overrides = {"num_key_value_heads": 4} if model_type == "llama" else {}
    folder = checkpoints.write(tmp_path / "model", model_type, **overrides)
    with pytest.raises(error, match=message):
        planned(folder, tmp_path / "out", prune, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_nobody_reads_is_not_left_as_wide_as_it_was(llama, tmp_path):
    folder = checkpoints.write(tmp_path / "model")
    held = checkpoints.tensors(folder)
    checkpoints.save(folder, held | {"score.weight": torch.zeros(2, 32)})
    with pytest.raises(ShapeError, match=r"LlamaForCausalLM does not read score.weight"):
        planned(folder, tmp_path / "out", 'method = "random"\npattern = "hidden"\nsparsity = 0.5')


@pytest.mark.parametrize("pattern", ["neurons", "heads"])
def test_blocks_for_multi_token_prediction_do_not_keep_sizes_that_the_config_no_longer_gives(
    tmp_path, pattern
):
    folder = checkpoints.write(tmp_path / "model", num_key_value_heads=4)
    held = checkpoints.tensors(folder)
    mask = {"model.layers.0.self_attn.bias": torch.zeros(1, 1, 64, 64)}
    prune = f'method = "random"\npattern = "{pattern}"\nsparsity = 0.5'
    checkpoints.save(folder, held | mask)
    planned(folder, tmp_path / "out", prune, evaluate=False)
    last = {name: value for name, value in held.items() if ".layers.1." in name}
    extra = {name.replace(".1.", ".2."): value.clone() for name, value in last.items()}
    checkpoints.save(folder, held | mask | extra)
    with pytest.raises(ShapeError, match=r"does not read model\.layers\.2\..*save it again"):
        planned(folder, tmp_path / "out", prune, evaluate=False)


def test_blocks_that_depend_on_their_place_are_refused_or_stay(tmp_path):
    folder = checkpoints.write(
        tmp_path / "model", "gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True
    )
    prune = 'method = "random"\npattern = "blocks"\nsparsity = {}'
    with pytest.raises(ShapeError, match=r"scaling is .* Blocks of this model cannot be taken out"):
        planned(folder, tmp_path / "out", prune.format(0.34), evaluate=False)
    folder = checkpoints.write(tmp_path / "bert", "modernbert", num_hidden_layers=3)
    made = planned(folder, tmp_path / "out", prune.format(0.34), evaluate=False)
    assert made.fixed == {"model.layers": [0]}
    assert "model.layers.0 stays whatever its score: no stock config" in " ".join(made.notes)


@pytest.mark.parametrize("prune", ['method = "leave-one-out"', 'method = "reap"\ntruth = true'])
def test_experts_of_groups_are_not_left_out_one_by_one(tmp_path, prune):
    folder, grouped = tmp_path / "model", {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    checkpoints.write(folder, "deepseek_v3", num_experts_per_tok=2, **grouped)
    with pytest.raises(ShapeError, match="from 3 to 4 open ones"):
        planned(folder, tmp_path / "out", f'{prune}\npattern = "experts"\nsparsity = 0.5')


def test_coordinates_of_experts_go_where_each_is_stored_by_itself(tmp_path):
    prune = 'method = "magnitude"\npattern = "hidden"\nsparsity = 0.25'
    folder = checkpoints.write(tmp_path / "model", "mixtral")
    finished(folder, tmp_path / "out", prune, evaluate=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["hidden_size"] == 24
    fused = tiny("mixtral")
    fused.save_pretrained(tmp_path / "fused", save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "text.txt"):
        (tmp_path / "fused" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ShapeError, match="only a tensor that is stored by itself can be cut"):
        planned(tmp_path / "fused", tmp_path / "other", prune, evaluate=False)
