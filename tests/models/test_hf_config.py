"""Reading ``config.json``: no code of the model runs, impossible sizes are refused."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.empty_model import empty_model
from prunekit.models.hf_config import call_transformers, config_and_class, read_hf_config
from prunekit.models.stock import config_value
from tests.support import checkpoints

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture
def single(tmp_path):
    return checkpoints.write(tmp_path)


@pytest.mark.parametrize("model_type", ["unheard_of", None])
def test_code_that_came_with_a_model_never_runs(single, model_type):
    ran = single / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass C: ...\n"
    (single / "configuration_x.py").write_text(code)
    (single / "modeling_x.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.C"}
    checkpoints.configure(single, model_type=model_type, auto_map=auto_map, trust_remote_code=True)
    with pytest.raises(CheckpointError, match=r"config.json: .*is never run"):
        empty_model(open_checkpoint(single))
    assert not ran.exists()


def test_a_known_model_type_is_built_from_stock_code_even_beside_other_code(single):
    (single / "modeling_x.py").write_text("raise SystemExit\n")
    checkpoints.configure(single, auto_map={"AutoModelForCausalLM": "modeling_x.C"})
    assert type(empty_model(open_checkpoint(single))).__module__.startswith("transformers.")


def test_a_count_that_its_class_has_by_default_is_no_claim(single):
    config = AutoConfig.for_model("doge", **SMALL)
    assert (config.num_experts, config.is_moe) == (16384, False)
    AutoModelForCausalLM.from_config(config).save_pretrained(single / "doge")
    assert empty_model(open_checkpoint(single / "doge")).config.num_experts == 16384
    checkpoints.configure(single / "doge", num_experts=16385)
    with pytest.raises(CheckpointError, match="num_experts is 16385, more than the files can"):
        empty_model(open_checkpoint(single / "doge"))


def test_a_number_that_the_class_computes_is_no_claim(tmp_path):
    config = read_hf_config(open_checkpoint(checkpoints.write(tmp_path, "xlnet")))
    assert config.max_position_embeddings == -1
    assert config_value(config, "max_position_embeddings") is None
    assert config_value(config, "d_model") == 32


def test_an_unknown_class_is_named(single):
    checkpoints.configure(single, architectures=["LlamaForNothing"])
    with pytest.raises(CheckpointError, match=r"config.json: transformers .* has no 'LlamaForN"):
        empty_model(open_checkpoint(single))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, more than the files can have"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, more than the files"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, more than any model has"),
    ],
    ids=["size", "count", "labels"],
)
def test_sizes_beyond_the_files_are_refused_before_anything_is_allocated(single, changes, message):
    checkpoints.configure(single, **changes)
    with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
        config_and_class(open_checkpoint(single))


def test_without_an_architecture_only_the_base_model_is_known(single):
    checkpoints.configure(single, architectures=None)
    config, model_class = config_and_class(open_checkpoint(single))
    assert config.model_type == "llama"
    assert model_class is None
    assert not config.use_cache


def test_any_exception_of_transformers_becomes_one_error_that_names_the_file(single):
    def fail():
        raise KeyError("rope")

    with pytest.raises(
        CheckpointError, match=r"config.json: transformers .* failed: KeyError: 'ro"
    ):
        call_transformers(open_checkpoint(single), "failed", fail)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": -1},
        {"vocab_size": 2.5},
        {"max_position_embeddings": -1},
        {"sliding_window": "x"},
        {"dtype": "int8"},
        {"dtype": 3},
        {"prunekit_kept": []},
        {"rope_parameters": 3},
        {"hidden_act": []},
    ],
    ids=str,
)
def test_values_that_no_model_has_are_refused_by_their_name(single, changes):
    checkpoints.configure(single, **changes)
    key = next(iter(changes))
    with pytest.raises(CheckpointError, match=rf"config.json: .*{key}|config.json: transformers"):
        empty_model(open_checkpoint(single))


def test_a_config_that_asks_for_tuples_gives_outputs_by_name(single):
    checkpoints.configure(single, return_dict=False)
    config, _ = config_and_class(open_checkpoint(single))
    assert config.return_dict
