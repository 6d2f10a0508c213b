"""What is written of a trained model: types, and values that these cannot hold."""

import pytest
import torch

from prunekit.errors import NumericsError
from prunekit.models.load import load
from prunekit.runs.trained.written import ModelWriter, gradual_records
from tests.support import checkpoints
from tests.support.trained import planned

GRADUAL = {"sparsity": 0.75, "end": 6, "every": 2}


class Output:
    """An output folder that keeps its shards in memory."""

    def __init__(self, folder):
        self.folder, self.tensors = folder, {}

    def write_shard(self, number, tensors):
        self.tensors |= tensors
        file = self.folder / f"{number}.safetensors"
        file.write_bytes(b"")
        return {file.name: ""}


def written(plan, model, folder):
    output = Output(folder)
    records = gradual_records(plan, {"model.layers.0.mlp.up_proj": "1:4"})
    return output, ModelWriter(plan, model, output).write(records, writes=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_that_did_not_change_are_written_as_they_were(tmp_path, dtype):
    folder = checkpoints.write(tmp_path / "model", dtype=dtype)
    for name in checkpoints.tensors(folder):
        if dtype == torch.float64:  # that float32 cannot hold
            checkpoints.change(folder, name, lambda value: value.add_(1e-12))
    plan = planned(folder, tmp_path / "out", GRADUAL)
    output, values = written(plan, load(folder, torch.float32), tmp_path)
    held = checkpoints.tensors(folder)
    assert output.tensors.keys() == held.keys()
    for name, value in held.items():
        assert output.tensors[name].dtype == dtype
        assert torch.equal(output.tensors[name], value)
    assert len(values["files"]) == 3
    patterns = [layer.get("pattern") for layer in values["layers"]]
    assert patterns.count("1:4") == 1


def test_a_value_beyond_the_range_of_its_type_is_refused(tmp_path):
    folder = checkpoints.write(tmp_path / "model", dtype=torch.float16)
    plan = planned(folder, tmp_path / "out", GRADUAL)
    model = load(folder, torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = 1e5
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj.*range of torch\.float16"):
        written(plan, model, tmp_path)
