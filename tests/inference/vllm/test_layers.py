"""Compressed layers inside vLLM itself; tier ``serve``."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import prunekit
from prunekit.checkpoint.formats import WeightLayout
from prunekit.errors import CheckpointError, ShapeError
from prunekit.inference.convert import convert
from tests.inference.vllm.conftest import SIZES, tokens_of_transformers
from tests.support import checkpoints
from tests.support.checkpoints import planned
from tests.support.corruptions import CORRUPTIONS, spoiled

pytestmark = pytest.mark.serve
STORIES = [[1, 9038, 2501, 263, 931], [1, 450, 2217, 11203]]  # Once upon a time; The little dog
LAYER = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("kind", ["2:4", "bitmask"])
@pytest.mark.parametrize("family", SIZES)
def test_generates_the_tokens_of_transformers(family, kind, folders, served):
    folder = folders / family / kind
    assert served(folder) == tokens_of_transformers(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_serves_stories15m_in_16_bits(dtype, shared, tmp_path_factory, served):
    place = tmp_path_factory.mktemp("stories")
    data = {"data": "pydoc:train", "samples": 2, "length": 64}
    source = shared / "models" / "stories15M"
    list(prunekit.run(planned(source, place / "dense", calibration=data)))
    folder = convert(place / "dense", place / "2:4", "2:4").folder
    expected = tokens_of_transformers(folder, getattr(torch, dtype), STORIES)
    assert served(folder, dtype=dtype, prompts=STORIES) == expected


def test_weights_stay_compressed(folders, served, monkeypatch):
    from prunekit.inference.vllm.layers import Sparse24LinearMethod

    kept = {}
    process = Sparse24LinearMethod.process_weights_after_loading

    def watched(method, layer):
        before = [layer.weight.data_ptr(), layer.keep.data_ptr()]
        process(method, layer)
        assert before == [layer.weight.data_ptr(), layer.keep.data_ptr()]
        kept[method.prefix] = (tuple(layer.weight.shape), tuple(layer.keep.shape))

    monkeypatch.setattr(Sparse24LinearMethod, "process_weights_after_loading", watched)
    served(folders / "llama" / "2:4")
    assert len(kept) == 8
    assert kept["model.layers.0.self_attn.qkv_proj"] == ((128, 32), (128, 8))
    assert kept["model.layers.0.mlp.down_proj"] == ((64, 32), (64, 8))


def test_fragment_order_is_reached_in_place_and_left_again(folders, served, monkeypatch):
    """As on an NVIDIA GPU, whose kernel computes the same on a CPU by its reference."""
    from prunekit.inference.vllm import layers

    monkeypatch.setattr(layers, "runs_mma", lambda weight: True)
    monkeypatch.setattr(layers, "has_fragments", lambda *shape: True)
    reversed_parts = lambda parts: type(parts)(*(each.flip(0) for each in parts))  # noqa: E731
    monkeypatch.setattr(layers, "to_fragments", reversed_parts)
    products = []

    def product(x, values, keep, reach):
        products.append(len(x))
        return layers.sparse24_matmul(x, values.flip(0), keep.flip(0), reach)

    monkeypatch.setattr(layers, "sparse24_mma", product)
    folder = folders / "llama" / "2:4"
    assert served(folder) == tokens_of_transformers(folder)
    assert products


def test_a_layer_fused_with_a_dense_one_is_expanded(folders, served, tmp_path):
    source = shutil.copytree(folders / "llama" / "dense", tmp_path / "dense")
    checkpoints.change(source, f"{LAYER}.weight", lambda weight: weight.normal_())
    folder = convert(source, tmp_path / "2:4", "2:4").folder
    assert f"{LAYER}.weight" in load_file(checkpoints.single(folder))
    assert served(folder) == tokens_of_transformers(folder)


def test_expands_on_request(folders, served, monkeypatch):
    from prunekit.inference.vllm.layers import Sparse24LinearMethod

    monkeypatch.setattr(Sparse24LinearMethod, "apply", None)
    folder = folders / "llama" / "2:4"
    assert served(folder, environment={"PRUNEKIT_EXPAND": "1"}) == tokens_of_transformers(folder)


def test_runs_compiled(folders, served):
    folder = folders / "llama" / "2:4"
    compiled = served(folder, enforce_eager=False, compilation_config={"backend": "eager"})
    assert compiled == tokens_of_transformers(folder)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("chosen", [1, 3, 5, 10, 13])
def test_corrupt_folders_are_refused_by_name(kind, chosen, folders, served, tmp_path):
    corruption = CORRUPTIONS[kind][chosen]
    folder = shutil.copytree(folders / "llama" / kind, tmp_path / "out")
    held = load_file(checkpoints.single(folder))
    checkpoints.save(folder, spoiled(held, corruption, f"{LAYER}."))
    fused = LAYER.replace("k_proj", "(k|qkv)_proj")
    with pytest.raises(CheckpointError, match=f"{fused}.*({corruption.message})"):
        served(folder)


def test_a_missing_norm_is_not_left_uninitialized(folders, served, tmp_path):
    folder = shutil.copytree(folders / "llama" / "2:4", tmp_path / "out")
    held = load_file(checkpoints.single(folder))
    del held["model.norm.weight"]
    checkpoints.save(folder, held)
    with pytest.raises(CheckpointError, match=r"has no model.norm.weight"):
        served(folder)


def test_a_split_within_a_byte_is_refused(folders):
    from prunekit.inference.vllm.layers import Sparse24LinearMethod
    from prunekit.inference.vllm.loading import PartLoader

    loader = PartLoader(folders / "x", {"a": None})
    method = Sparse24LinearMethod("a.down_proj", loader)
    message = r"a.down_proj: --tensor-parallel-size splits its 24 inputs into 12.*prunekit convert"
    with pytest.raises(ShapeError, match=message):
        method.create_weights(torch.nn.Module(), 12, [8], 24, 8, torch.float32, weight_loader=None)


def test_layout_counts_half_of_the_values():
    from prunekit.inference.vllm.layers import _layout

    assert _layout(8, 16) == WeightLayout(8, 16, 64)
