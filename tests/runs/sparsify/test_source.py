"""The model of a run that prunes weights: its linears, skips and stored types."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from prunekit.errors import CheckpointError, ConfigError, ShapeError
from tests.support import checkpoints
from tests.support.checkpoints import NOT_COPIED, planned


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_probing_is_said(tmp_path, output):
    plan = planned(checkpoints.write(tmp_path / "m", "olmo2"), output)
    assert plan.architecture.probed
    assert plan.notes[0].startswith("Model type 'olmo2' is not declared; its blocks and stages")


def test_a_pattern_that_divides_no_row_is_refused_with_every_layer_named(llama, output):
    with pytest.raises(ShapeError) as caught:
        planned(llama, output, prune={"pattern": "3:5"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("model.layers.0.self_attn.q_proj: pattern 3:5")
    assert lines[5] == "… and 9 more"
    assert 'on_indivisible = "skip"' in lines[-1]


def test_layers_that_a_pattern_does_not_divide_stay_dense_where_that_is_said(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", intermediate_size=66)
    with pytest.raises(ShapeError, match=r"layers.0.mlp.down_proj: pattern 2:4"):
        planned(folder, output)
    plan = planned(folder, output, prune={"on_indivisible": "skip"})
    dense = [linear.name for linear in plan.linears if linear.skipped]
    assert dense == [f"model.layers.{block}.mlp.down_proj" for block in range(2)]
    assert all(any(name in note for note in plan.notes) for name in dense)
    assert not plan.sizes.keys() & dense


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (["model.layers.0.*"], 7),
        (["*.down_proj"], 2),
        (["mlp.down_proj"], 2),
        (["*.q_proj", "self_attn.q_proj"], 2),
        (["lm_head"], 0),
        (["model.layers.?.mlp.*", "*.o_proj"], 8),
    ],
)
def test_skip_takes_names_paths_and_patterns(llama, output, skip, dense):
    plan = planned(llama, output, prune={"skip": skip})
    assert sum(linear.skipped is not None for linear in plan.linears) == dense
    assert [*plan.notes[dense:]] == [NOT_COPIED]


def test_a_skip_that_matches_nothing_is_refused(llama, output):
    with pytest.raises(ConfigError, match=r'prune.skip: "down_proj" matches no module. Names look'):
        planned(llama, output, prune={"skip": ["*.q_proj", "down_proj"]})


def test_skipping_everything_is_refused(llama, output):
    with pytest.raises(ConfigError, match="every linear of the model is skipped"):
        planned(llama, output, prune={"skip": ["*"]})


def test_matrices_that_stay_dense_are_named(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", "qwen2_moe")
    notes = planned(folder, output).notes
    assert notes[1:] == (
        "model.layers.*.mlp.gate.weight stays dense: its module, Qwen2MoeTopKRouter, is no linear.",
        checkpoints.NOT_COPIED,
    )
    folder = checkpoints.write(tmp_path / "llava", "llava", head=AutoModelForImageTextToText)
    notes = planned(folder, tmp_path / "other").notes
    assert notes[1:] == (
        "model.vision_tower, model.multi_modal_projector stay dense: outside of the blocks.",
        checkpoints.NOT_COPIED,
    )
    folder = checkpoints.write(tmp_path / "phimoe", "phimoe")
    notes = planned(folder, tmp_path / "third").notes
    assert "model.layers.1.mlp.router stays dense: it chooses the experts." in notes


def test_experts_of_an_unknown_layout_are_refused_by_name(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", "jetmoe")
    with pytest.raises(CheckpointError, match="JetMoeParallelExperts"):
        planned(folder, output)


@pytest.mark.parametrize(
    "prune",
    [
        {"pattern": "block:16x16", "sparsity": 0.05, "on_indivisible": "skip"},
        {"pattern": "unstructured", "sparsity": 0.001},
    ],
)
def test_a_sparsity_that_takes_nothing_is_refused(llama, output, prune):
    with pytest.raises(ConfigError, match=rf"sparsity: {prune['sparsity']} takes nothing of any"):
        planned(llama, output, prune=prune)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_stored_as_they_were_unless_a_type_is_asked_for(tmp_path, output, dtype):
    kind = getattr(torch, dtype)
    folder = checkpoints.write(tmp_path / "m", dtype=kind)
    assert set(planned(folder, output).stored.values()) == {kind}
    asked = planned(folder, output, model={"dtype": "float16"})
    assert set(asked.stored.values()) == {torch.float16}
    assert asked.dtype == torch.float32


def test_mixed_types_stay_mixed(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.down_proj"
    checkpoints.change(folder, f"{name}.weight", lambda weight: weight.float())
    plan = planned(folder, output)
    assert plan.stored[name] == torch.float32
    assert plan.stored["model.layers.1.mlp.down_proj"] == torch.bfloat16
