"""Compressed checkpoints loaded and saved by transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import prunekit
from prunekit.checkpoint.weight_files import INDEX_FILE
from prunekit.errors import CheckpointError
from prunekit.inference.convert import convert
from prunekit.inference.sparse_linear import SparseLinear
from tests.support import checkpoints
from tests.support.checkpoints import planned
from tests.support.closeness import assert_close
from tests.support.corruptions import CASES, CORRUPTIONS, Corruption, spoiled

KINDS = ["2:4", "bitmask"]
IDS = torch.arange(1, 17)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_sparse_layers(sparse_folders, kind, dtype):
    sparse = AutoModelForCausalLM.from_pretrained(sparse_folders / kind, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(sparse_folders / "dense", dtype=dtype)
    layers = [module for module in sparse.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 14
    assert not any(hasattr(layer, "dense_weight") for layer in layers)
    exact = AutoModelForCausalLM.from_pretrained(sparse_folders / "dense", dtype=torch.float64)
    assert_close(logits(sparse), logits(exact), logits(dense))
    new = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(sparse.generate(IDS, **new), dense.generate(IDS, **new))


@pytest.mark.parametrize("kind", KINDS)
def test_saves_what_it_loaded(sparse_folders, kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_folders / kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    plain = again.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in plain.modules())
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_expands_while_it_loads_where_that_is_asked(sparse_folders, kind, tmp_path, monkeypatch):
    expected = logits(AutoModelForCausalLM.from_pretrained(sparse_folders / kind))
    monkeypatch.setenv("PRUNEKIT_EXPAND", "1")
    model = AutoModelForCausalLM.from_pretrained(sparse_folders / kind)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert_close(logits(model), expected, expected)
    model.save_pretrained(tmp_path)  # as the dense model that it is
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"is offloaded to files, where PRUNEKIT_EXPAND"):
        AutoModelForCausalLM.from_pretrained(
            sparse_folders / kind,
            device_map={
                "model.embed_tokens": "cpu",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "cpu",
                "model.layers": "disk",
            },
            offload_folder=tmp_path / "offload",
            offload_buffers=True,
        )


def test_loads_without_a_head(sparse_folders):
    model = AutoModel.from_pretrained(sparse_folders / "2:4")
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 14


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        (
            {"model.layers.0.mlp.up_proj": [64, 36, 1]},
            "is listed as compressed from a linear layer whose",
        ),
        ({"a.b": [64, 36, 1]}, "none of the 1 layers that it lists as compressed is in LlamaForC"),
    ],
)
def test_a_config_of_another_model_is_refused(sparse_folders, linears, message, tmp_path):
    folder = convert(sparse_folders / "dense", tmp_path / "out", "2:4").folder
    said = {"quant_method": "prunekit", "format": "2:4", "linears": linears}
    checkpoints.configure(folder, quantization_config=said)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


WITHOUT = """
import sys
sys.modules["prunekit"] = None  # as if it were not installed
import transformers
transformers.AutoModelForCausalLM.from_pretrained(*arguments)
print("loaded")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_without_prunekit_transformers_refuses(sparse_folders, kind, stock_server, tmp_path):
    world = stock_server.start(tmp_path, 1, WITHOUT, sparse_folders / kind)
    assert world.wait() != [0]
    assert "loaded" not in world.stdout(0)
    said = world.stderr(0)
    assert "Unknown quantization type, got prunekit" in said
    assert "size mismatch" in said
    assert said.strip().splitlines()[-1].startswith("RuntimeError")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A model whose down_proj has a bias and a last byte with pad bits, in each format."""
    folder = tmp_path_factory.mktemp("ragged")
    checkpoints.write(
        folder / "m", dtype=torch.bfloat16, intermediate_size=36, mlp_bias=True, num_hidden_layers=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        list(prunekit.run(planned(folder / "m", folder / "dense")))
    for kind in KINDS:
        convert(folder / "dense", folder / kind, kind)
    return folder


LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def corrupt(ragged, tmp_path):
    """A function that writes a folder with one corruption."""

    def write(kind, corruption):
        folder = tmp_path / "out"
        shutil.copytree(ragged / kind, folder)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        (file,) = folder.glob("*.safetensors")
        held = spoiled(load_file(file), corruption, f"{LAYER}.")
        file.unlink()
        checkpoints.save(folder, held)
        return folder

    return write


@pytest.mark.parametrize(("kind", "corruption"), CASES, ids=str)
def test_corrupt_layers_are_refused_by_name(corrupt, kind, corruption):
    folder = corrupt(kind, corruption)
    for options in ({}, {"ignore_mismatched_sizes": True}, {"dtype": torch.float32}):
        with pytest.raises(CheckpointError, match=f"{LAYER}.*({corruption.message})"):
            AutoModelForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(CheckpointError, match=f"{LAYER}.*({corruption.message})"):
        prunekit.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_bias_is_not_initialized(corrupt, kind):
    folder = corrupt(kind, Corruption("", "bias", None, ""))
    with pytest.raises(CheckpointError, match=f"lacks {LAYER}.bias"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["weight", "keep", "bias"])
def test_parts_missing_in_a_given_state_dict_are_not_initialized(ragged, part):
    config = AutoConfig.from_pretrained(ragged / "2:4")
    given = AutoModelForCausalLM.from_pretrained(ragged / "2:4").state_dict()
    options = {"config": config, "dtype": torch.bfloat16}
    loaded = LlamaForCausalLM.from_pretrained(None, **options, state_dict=dict(given))
    assert torch.equal(loaded.state_dict()[f"{LAYER}.keep"], given[f"{LAYER}.keep"])
    del given[f"{LAYER}.{part}"]
    with pytest.raises(CheckpointError, match=f"{LAYER}: "):
        LlamaForCausalLM.from_pretrained(None, **options, state_dict=given)


@pytest.mark.parametrize("corruption", [*CORRUPTIONS["bitmask"]][-3:], ids=str)
def test_layers_that_are_offloaded_are_checked(ragged, corrupt, corruption, tmp_path):
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head"], "cpu")
    options = {
        "device_map": places | {"model.rotary_emb": "cpu", "model.layers": "disk"},
        "offload_folder": tmp_path / "offloaded",
        "offload_buffers": True,
    }
    model = AutoModelForCausalLM.from_pretrained(ragged / "bitmask", **options)
    assert model.get_submodule(LAYER).parts["keep"].is_meta
    whole = AutoModelForCausalLM.from_pretrained(ragged / "bitmask")
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(CheckpointError, match=f"{LAYER}.*({corruption.message})"):
        AutoModelForCausalLM.from_pretrained(corrupt("bitmask", corruption), **options)


ENTRIES = {
    "no entries": {},
    "no format": {"linears": {}},
    "no linears": {"format": "2:4"},
    "a list": {"format": "2:4", "linears": [1]},
    "unknown format": {"format": "4:2", "linears": {}},
    "format of another type": {"format": ["2:4"], "linears": {}},
    "huge": {"format": "2:4", "linears": {LAYER: [2**62, 2**62, 2**63]}},
    "huge count": {"format": "bitmask", "linears": {LAYER: [32, 36, 2**50]}},
    "negative": {"format": "2:4", "linears": {LAYER: [-32, -36, 576]}},
    "text": {"format": "2:4", "linears": {LAYER: "[32, 36, 576]"}},
    "fewer values": {"format": "2:4", "linears": {LAYER: [32, 36, 575]}},
    "other format": {"format": "bitmask", "linears": {LAYER: [32, 36, 576]}},
    "transposed": {"format": "2:4", "linears": {LAYER: [36, 32, 576, True]}},
    "transposed by a word": {"format": "2:4", "linears": {LAYER: [32, 36, 576, "no"]}},
}


@pytest.mark.parametrize("said", ENTRIES.values(), ids=ENTRIES)
def test_invalid_entries_of_the_config_are_refused(ragged, tmp_path, said):
    folder = shutil.copytree(ragged / "2:4", tmp_path / "out")
    checkpoints.configure(folder, quantization_config={"quant_method": "prunekit"} | said)
    for read in (AutoModelForCausalLM.from_pretrained, prunekit.load):
        with pytest.raises(CheckpointError, match=rf"quantization_config|{LAYER}"):
            read(folder)
