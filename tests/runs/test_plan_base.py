"""Values that all plans share."""

from types import SimpleNamespace

import pytest

from prunekit.config.load import load_config
from prunekit.errors import CapacityError
from prunekit.runs import jobs
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


@pytest.mark.parametrize("limit", ["50GB", 30_000, 1])
def test_the_disk_has_room_for_a_file_and_a_shard_beside_the_checkpoint(tmp_path, output, limit):
    folder = checkpoints.write(tmp_path / "m", num_hidden_layers=3)
    plan = planned(folder, output, output={"max_shard_size": limit})
    sizes = {name: value.nbytes for name, value in checkpoints.tensors(folder).items()}
    shards = dict.fromkeys(["rest", *plan.stacks[0].names], 0)
    for name, size in sizes.items():
        shards[next((each for each in shards if name.startswith(f"{each}.")), "rest")] += size
    assert plan.largest_shard == max(shards.values())
    file = {"50GB": sum(sizes.values()), 30_000: 30_000, 1: max(sizes.values())}[limit]
    assert plan.joining == min(sum(sizes.values()), file + max(shards.values()))
    assert plan.least_joining == max(sizes.values()) + max(shards.values())
    assert "more while its files are written" in plan.joining_words


def disk(monkeypatch, free):
    usage = SimpleNamespace(total=10**9, free=free)
    monkeypatch.setattr("prunekit.runs.checks.shutil.disk_usage", lambda _: usage)


def test_a_disk_without_that_room_is_refused_and_a_smaller_limit_is_not(
    tmp_path, output, monkeypatch
):
    folder = checkpoints.write(tmp_path / "m", num_hidden_layers=3)
    plan = planned(folder, output)
    least = plan.least_joining
    assert least < plan.joining
    disk(monkeypatch, plan.checkpoint.nbytes + least)
    with pytest.raises(CapacityError, match=r"a smaller output\.max_shard_size needs "):
        planned(folder, output)
    assert planned(folder, output, output={"max_shard_size": 1})
    disk(monkeypatch, plan.checkpoint.nbytes + least - 1)
    with pytest.raises(CapacityError, match=r"more while its files are written\.$"):
        planned(folder, output, output={"max_shard_size": 1})


def test_a_run_that_writes_one_shard_needs_the_whole_again(tmp_path, output, monkeypatch):
    """Its shard is there until the last file is written, whatever the limit is."""
    folder = checkpoints.write(tmp_path / "m", num_hidden_layers=3)
    prune = 'method = "magnitude"\npattern = "heads"\nsparsity = 0.5\nend = 2\n'
    path = structured.write_config(folder, output, prune)
    text = path.read_text() + "[train]\nheld_out = 2\nsave_every = 0\n"
    path.write_text(text.replace("[output]\n", "[output]\nmax_shard_size = 1\n"))
    plan = jobs.plan(load_config(path))
    assert plan.config.output.max_shard_size == 1
    assert plan.joining == plan.least_joining == plan.checkpoint.nbytes
    disk(monkeypatch, 2 * plan.checkpoint.nbytes - 1)
    with pytest.raises(CapacityError, match=r"more while its files are written\.$"):
        jobs.plan(load_config(path))


def test_a_plan_is_shown_on_one_line(tmp_path):
    plan = checkpoints.planned(checkpoints.write(tmp_path / "m"), tmp_path / "out")
    assert repr(plan) == f"<Plan: {tmp_path}/m by wanda, 2:4, to {tmp_path}/out>"
    assert repr(plan.config.model) == f"Model(path='{tmp_path}/m', device='cpu')"
