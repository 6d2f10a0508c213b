"""The memory of a run by block, and where hidden states are stored."""

import torch

from prunekit.runs.structured.blockwise_memory import blockwise_memory, by_place, placed
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


def test_each_ranker_holds_what_it_gathers(tmp_path):
    folder = checkpoints.write(tmp_path / "model")
    found = {
        ranker: planned(folder, tmp_path / "out", f'{HEADS.format(ranker)}\ncompensate = "none"')
        for ranker in ("gradient", "llm-pruner", "obs", "magnitude")
    }
    on_gpu = {
        ranker: blockwise_memory(plan._costs, torch.bfloat16, torch.device("cuda"))
        for ranker, plan in found.items()
    }
    gram = on_gpu["obs"]["statistics"]  # the similarity of heads takes one in any case
    assert on_gpu["gradient"]["statistics"] == on_gpu["magnitude"]["statistics"] == gram
    assert on_gpu["llm-pruner"]["statistics"] > gram
    assert on_gpu["obs"]["solving"] > on_gpu["gradient"]["solving"]


def test_scores_are_solved_in_main_memory(tmp_path):
    folder = checkpoints.write(tmp_path / "model")
    made = planned(folder, tmp_path / "out", HEADS.format("obs"))
    memory, cuda = made.memory | {"solving": 1000, "hidden states": 100}, torch.device("cuda")
    whole = sum(memory.values())
    assert by_place(memory, "device", CPU) == (whole, 0, 0)
    assert by_place(memory, "disk", CPU) == (whole - 100, 0, 100)
    assert by_place(memory, "device", cuda) == (whole - 1000, 1000, 0)
    assert by_place(memory, "host", cuda) == (whole - 1100, 1100, 0)
    assert by_place(memory, "disk", cuda) == (whole - 1100, 1000, 100)


def test_a_refit_may_keep_all_units_of_a_layer_where_layers_are_compared(tmp_path):
    folder, cuda = checkpoints.write(tmp_path / "model"), torch.device("cuda")
    prune = 'method = "magnitude"\npattern = "neurons"\nsparsity = 0.9\ncompensate = "refit"\n'
    solving = {
        scope: blockwise_memory(
            planned(folder, tmp_path / "out", f'{prune}scope = "{scope}"')._costs,
            torch.float32,
            cuda,
        )["solving"]
        for scope in ("layer", "global")
    }
    # The copy of H and the weights are the same; the factor and the products are not.
    assert solving["global"] > 2 * solving["layer"]
