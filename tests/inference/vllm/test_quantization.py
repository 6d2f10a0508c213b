"""Names of compressed layers in the models of vLLM; tier ``serve``."""

import shutil

import pytest
from torch import nn

from prunekit.checkpoint.formats import QUANT_METHOD
from prunekit.errors import CheckpointError
from tests.support import checkpoints

pytestmark = pytest.mark.serve
LINEARS = {
    "model.layers.0.self_attn.q_proj": [8, 8, 32],
    "model.layers.0.mlp.experts.0.up": [8, 8, 32],
}


@pytest.fixture
def config():
    from prunekit.inference.vllm.quantization import SparseConfig

    made = SparseConfig.from_config({"format": "2:4", "linears": LINEARS})
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def test_has_the_name_of_the_formats(config):
    assert config.get_name() == QUANT_METHOD


@pytest.mark.parametrize("prefix", ["model.layers.0", "layers.0", "outer.model.layers.0"])
def test_finds_the_layers_of_a_fused_one_with_and_without_the_base_model(config, prefix):
    found = config.stored(f"{prefix}.self_attn.qkv_proj")
    assert [weight is not None for weight in found.values()] == [True, False, False]


def test_follows_the_names_of_vllm(config):
    from vllm.model_executor.models.utils import WeightsMapper

    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model."}))
    assert config.stored("language_model.layers.0.self_attn.q_proj").popitem()[1]


def test_layers_that_are_no_linears_have_to_be_dense(config):
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(CheckpointError, match=r"experts\.0\.up is compressed, and Embedding of"):
        config.get_quant_method(nn.Embedding(2, 2), "model.layers.0.mlp.experts")


def test_an_invalid_entry_is_refused():
    from prunekit.inference.vllm.quantization import SparseConfig

    with pytest.raises(CheckpointError, match=r"its quantization_config is not one"):
        SparseConfig.from_config({"format": "2:4", "linears": {"a": [1]}})


def test_checks_the_folder_by_its_headers(config, folders, tmp_path):
    config.maybe_update_config(str(folders / "llama" / "2:4"))
    assert config.folder == folders / "llama" / "2:4"
    folder = shutil.copytree(folders / "llama" / "2:4", tmp_path / "out")
    checkpoints.configure(folder, prunekit_kept={"heads": {}})
    with pytest.raises(CheckpointError, match="keep different numbers"):
        config.maybe_update_config(str(folder))
