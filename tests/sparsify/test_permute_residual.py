"""Permuted residual stream: the same dense model, lower errors for n:m."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.data.tokens import calibration_tokens
from prunekit.errors import ConfigError
from prunekit.models.layout import LinearSelection, list_blocks, stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches
from prunekit.patterns import parse
from prunekit.runs.sparsify.run import run
from prunekit.sparsify.permute_residual import permute_residual, residual_axes, residual_order
from prunekit.sparsify.recipe import Recipe
from tests.sparsify.test_permute_channels import IDS, answer, noisy
from tests.support.architectures import TINY, tiny
from tests.support.checkpoints import configure, planned, run_whole_and_stopped, tensors, write

pytestmark = pytest.mark.usefixtures("no_page")

SECTION = {"method": "wanda", "pattern": "2:4", "permute": "residual"}
HAVE_STREAM = [kind for kind in sorted(TINY) if find_architecture(tiny(kind)).stream]


def found_in(model):
    stacks = stack_runners(model, find_architecture(model))
    blocks = list_blocks(stacks, LinearSelection(parse("2:4"), (), "error"))
    visits = zip(
        iterate_blocks(model, stacks, None, split_batches(IDS, model.device)), blocks, strict=True
    )
    recipe = Recipe.of(Prune.model_validate(SECTION), calibrated=True)
    return residual_order(visits, blocks, residual_axes(model), recipe)


@pytest.mark.parametrize("model_type", HAVE_STREAM)
@torch.no_grad()
def test_any_order_leaves_what_the_model_answers(model_type):
    model = noisy(model_type)
    dense, width = answer(model), model.config.hidden_size
    before = {name: value.clone() for name, value in model.named_parameters()}
    axes = residual_axes(model)
    permute_residual(model, axes, torch.randperm(width).tolist())
    torch.testing.assert_close(answer(model), dense, rtol=1e-4, atol=1e-5)
    after = dict(model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == axes.keys() & before.keys()
    assert any(after[name] is model.get_input_embeddings().weight for name in moved)


def test_llama_is_among_those_that_can():
    assert {"llama", "qwen3", "gemma2", "t5"} <= {*HAVE_STREAM}
    assert not {"gpt2", "opt", "bert"} & {*HAVE_STREAM}


def test_puts_large_coordinates_apart():
    """Norms scale up four neighbouring coordinates."""
    model = noisy("llama")
    large = torch.arange(4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layernorm" in name:
                value[large] *= 100
    found = torch.tensor(found_in(model)).view(-1, 4)
    assert sorted(found.flatten().tolist()) == [*range(model.config.hidden_size)]
    assert torch.isin(found, large).sum(1).max() <= 2


def test_loses_less_to_the_pattern():
    errors = []
    for permute in (True, "residual"):
        model = noisy("llama")
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "layernorm" in name:
                    value[:8] *= 10
        entries = prunekit.prune(model, IDS, **SECTION | {"permute": permute})
        errors.append([e["relative_error"] for e in entries if "gate_proj" in e["name"]])
    assert all(after < 0.9 * before for before, after in zip(*errors, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_writes_what_moved_and_goes_on_in_the_same_bytes(tied, tmp_path):
    folder = write(tmp_path / "m", "llama", tie_word_embeddings=tied)
    prune = SECTION | {"skip": ["*q_proj"]}
    sections = {"prune": prune, "evaluate": {"data": str(folder / "text.txt"), "length": 12}}
    whole, stopped = run_whole_and_stopped(folder, tmp_path, **sections)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (stopped / file.name).read_bytes()
    dense, pruned = tensors(folder), tensors(stopped)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(dense[name], pruned[name])
        assert torch.equal(dense[name].sort(1).values, pruned[name].sort(1).values)


def test_a_run_gives_what_pruning_in_memory_gives(tmp_path):
    folder = write(tmp_path / "m", "llama")
    made = planned(folder, tmp_path / "out", prune=SECTION)
    assert any("coordinates of the residual stream" in note for note in made.notes)
    list(run(made))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = calibration_tokens(tokenizer, [str(folder / "text.txt")], 4, 12, 0).ids
    prunekit.prune(model, ids, **SECTION)
    for name, value in tensors(tmp_path / "out").items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_tensor_that_the_model_does_not_read_is_not_left_in_the_old_order(tmp_path):
    folder = write(tmp_path / "m", "llama", tie_word_embeddings=False)
    configure(folder, architectures=["LlamaModel"])
    with pytest.raises(ConfigError, match=r"LlamaModel, which .* does not read lm_head\.weight"):
        planned(folder, tmp_path / "out", prune=SECTION)


def test_is_refused_where_it_means_nothing():
    with pytest.raises(ConfigError, match=r"type 'gpt2' have it.*permute = true reorders"):
        prunekit.prune(tiny("gpt2"), IDS, **SECTION)
    with pytest.raises(ConfigError, match=r"permute: .* Choose: false, true, residual"):
        prunekit.prune(tiny("llama"), IDS, **SECTION | {"permute": "stream"})
