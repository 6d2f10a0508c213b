"""Gates that outlive the process: masks and factors in a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
from prunekit.errors import CheckpointError, ConfigError
from tests.support.units import batch, randomized_model, valid_logits


def closed_gates(kind="neurons", family="llama"):
    gates = getattr(prunekit, kind)(randomized_model(family))
    gates.prune(gates.score("magnitude"), 0.5)
    if kind in {"heads", "neurons"}:
        gates.gate(1, 3 if kind == "neurons" else 1, 0.25)
    return gates


@pytest.mark.parametrize("kind", ["heads", "neurons", "blocks", "hidden"])
def test_saved_gates_go_on_in_another_model_and_units_return_with_their_factors(kind, tmp_path):
    gates = closed_gates(kind)
    given = batch(gates.model)
    gates.save(tmp_path / "gates.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["gates.safetensors"]
    other = getattr(prunekit, kind)(randomized_model("llama"))
    dense = valid_logits(other.model, given)
    other.load(str(tmp_path / "gates.safetensors"))
    assert torch.equal(valid_logits(other.model, given), valid_logits(gates.model, given))
    assert other.kept == gates.kept
    for each in (gates, other):
        each.reactivate([(0, unit) for unit in range(each.groups[0].units)])
    assert torch.equal(valid_logits(other.model, given), valid_logits(gates.model, given))
    other.undo()
    other.undo()
    assert torch.equal(valid_logits(other.model, given), dense)


def test_values_that_are_trained_are_still_those_of_the_optimizer(tmp_path):
    gates = closed_gates()
    gates.save(tmp_path / "g")
    other = prunekit.neurons(randomized_model("llama"))
    value = other.gates["model.layers.1.mlp.down_proj"].value.requires_grad_()
    other.load(tmp_path / "g")
    assert other.gates["model.layers.1.mlp.down_proj"].value is value
    assert value.requires_grad
    assert value[3] == 0.25


def test_gates_of_other_units_are_refused_and_nothing_is_changed(tmp_path):
    file = tmp_path / "gates"
    closed_gates().save(file)
    for kind, family, sizes, message in (
        ("heads", "llama", {}, "no gates on the heads of this model"),
        ("neurons", "gpt2", {}, "no gates on the neurons of this model"),
        ("neurons", "llama", {"num_hidden_layers": 3}, "layers.2.* not in the file"),
        ("neurons", "llama", {"intermediate_size": 48}, r"shape \[64\]; the model has 48 neurons"),
    ):
        gates = getattr(prunekit, kind)(randomized_model(family, **sizes))
        with pytest.raises(CheckpointError, match=message):
            gates.load(file)
        assert gates.closed == 0
        with pytest.raises(ConfigError, match="nothing is left"):
            gates.undo()


def test_damaged_files_are_refused(tmp_path):
    gates, file = closed_gates(), tmp_path / "gates"
    with pytest.raises(CheckpointError, match="cannot be read"):
        gates.load(file)
    gates.save(file)
    stored = load_file(file)
    key = next(key for key in stored if key.endswith("value"))
    save_file(stored | {key: torch.full((64,), torch.nan)}, file)
    with pytest.raises(CheckpointError, match="gate of unit 0 is not a finite number"):
        gates.load(file)
    save_file(stored | {key: torch.ones(64, dtype=torch.int64)}, file)
    with pytest.raises(CheckpointError, match=r"is torch\.int64 of shape"):
        gates.load(file)
    save_file(stored, file)
    file.write_bytes(file.read_bytes().replace(b"\1\0\1", b"\1\2\1", 1))
    with pytest.raises(CheckpointError, match="bytes other than 0 and 1"):
        gates.load(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        gates.load(file)


def test_a_path_without_a_folder_is_refused(tmp_path):
    gates = closed_gates()
    for path in (tmp_path, tmp_path / "none" / "gates"):
        with pytest.raises(ConfigError, match="in a folder that exists"):
            gates.save(path)
