"""Values that all plans share."""

from types import SimpleNamespace

import pytest

from prunekit.errors import CapacityError
from tests.support import checkpoints, structured
from tests.support.architectures import tiny
from tests.support.checkpoints import planned


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_parameters_are_counted_once_when_tied(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m", tie_word_embeddings=True)
    model = tiny("llama", tie_word_embeddings=True)
    assert planned(folder, output).parameters == model.num_parameters()
    untied = checkpoints.write(tmp_path / "n", tie_word_embeddings=False)
    assert planned(untied, output).parameters == model.num_parameters() + 96 * 32


@pytest.mark.parametrize(("model_type", "blocks"), [("llama", 2), ("t5", 4)])
def test_blocks_of_all_stacks_are_counted(tmp_path, output, model_type, blocks):
    overrides = {"num_layers": 2, "num_decoder_layers": 2} if model_type == "t5" else {}
    plan = planned(checkpoints.write(tmp_path / "m", model_type, **overrides), output)
    assert plan.block_count == len(plan.blocks) == blocks


def test_plans_of_both_kinds_count_the_same_parameters(tmp_path, output):
    folder = checkpoints.write(tmp_path / "m")
    zeros = planned(folder, output)
    units = structured.planned(folder, output, structured.BOTH)
    assert zeros.parameters == units.parameters
    assert 0 < zeros.prunable <= zeros.parameters
    assert 0 < units.prunable <= units.parameters


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("50GB", "all"), (30_000, 30_000), (1, "the largest tensor")],
)
def test_the_disk_has_room_for_the_largest_file_beside_the_checkpoint(
    tmp_path, output, limit, expected
):
    folder = checkpoints.write(tmp_path / "m")
    plan = planned(folder, output, output={"max_shard_size": limit})
    sizes = [value.nbytes for value in checkpoints.tensors(folder).values()]
    assert plan.joining == {"all": sum(sizes), "the largest tensor": max(sizes)}.get(
        expected, expected
    )
    assert "more while its files are written" in plan.joining_words


def test_a_disk_without_that_room_is_refused_and_a_smaller_limit_is_not(
    tmp_path, output, monkeypatch
):
    folder = checkpoints.write(tmp_path / "m")
    size = sum(value.nbytes for value in checkpoints.tensors(folder).values())
    usage = SimpleNamespace(total=10**9, free=size + size // 2)
    monkeypatch.setattr("prunekit.runs.checks.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CapacityError, match=r"a smaller output\.max_shard_size needs less"):
        planned(folder, output)
    assert planned(folder, output, output={"max_shard_size": size // 4})
