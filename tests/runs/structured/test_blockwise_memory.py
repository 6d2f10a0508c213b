"""The memory of a run by block, and where hidden states are stored."""

import torch

from prunekit.runs.structured.blockwise_memory import placed
from tests.support import checkpoints
from tests.support.structured import planned

CPU = torch.device("cpu")
HEADS = 'method = "{}"\npattern = "heads"\nsparsity = 0.5'


def test_blocks_beyond_the_first_only_add_inputs_that_are_kept_for_the_gradient(tmp_path):
    found = {}
    for layers in (2, 4):
        folder = checkpoints.write(tmp_path / str(layers), num_hidden_layers=layers)
        for ranker in ("output-norm", "gradient"):
            found[ranker, layers] = planned(folder, tmp_path / "out", HEADS.format(ranker)).memory
    assert found["output-norm", 2] == found["output-norm", 4]
    few, many = found["gradient", 2], found["gradient", 4]
    assert many["hidden states"] - few["hidden states"] == found["output-norm", 2]["hidden states"]
    assert {**few, "hidden states": 0} == {**many, "hidden states": 0}


def test_hidden_states_lie_where_there_is_room_or_where_the_user_says():
    memory = {"block": 100, "hidden states": 1000}
    for free, expected in ((10_000, "device"), (500, "disk")):
        assert placed(memory, None, CPU, (free, free)) == expected
    room = 10_000, 10_000
    assert placed(memory, "device", CPU, room) == "device"
    assert placed(memory, "host", CPU, room) == "device"  # which is main memory
    assert placed(memory, "disk", CPU, room) == "disk"
    for host, expected in ((10_000, "host"), (500, "disk")):
        assert placed(memory, None, torch.device("cuda"), (500, host)) == expected
