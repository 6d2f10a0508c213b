"""Blocks are written while the next one is pruned, no more than one of them."""

import time
from threading import Event, current_thread, main_thread

import pytest

from prunekit.checkpoint.journal import JOURNAL, read_journal
from prunekit.runs.sparsify import run as running
from prunekit.runs.sparsify import shards
from prunekit.runs.sparsify.run import SparsifyRun, run
from tests.support import checkpoints
from tests.support.checkpoints import planned, same_bytes

pytestmark = pytest.mark.usefixtures("no_page", "proof_in_process")
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """Output folder and records of a run."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    return folder, [*run(planned(model, folder))]


@pytest.fixture
def held(monkeypatch):
    """Blocks are written once they may be; returns what happens, and the permission."""
    happened, may = [], [Event() for _ in range(BLOCKS)]
    write, prune = shards.ShardWriter.write_block, running.BlockPruner.prune

    def hold(self, number, *rest, **options):
        assert current_thread() is not main_thread()
        assert may[number].wait(20)
        happened.append(f"write {number}")
        return write(self, number, *rest, **options)

    def note(self, loaded, block):
        happened.append(f"prune {loaded.index}")
        yield from prune(self, loaded, block)
        happened.append(f"pruned {loaded.index}")

    monkeypatch.setattr(shards.ShardWriter, "write_block", hold)
    monkeypatch.setattr(running.BlockPruner, "prune", note)
    return happened, may


def kinds(records):
    return [(each.kind, each.name) for each in records if each.kind != "finish"]


def test_the_next_block_is_pruned_while_one_is_written(model, expected, held, tmp_path):
    happened, may = held
    real = SparsifyRun._written

    def waits(self):
        if self.written._writing:
            may[self.written._writing.number].set()
        yield from real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparsifyRun, "_written", waits)
        records = [*run(planned(model, tmp_path / "out"))]
    # Each is allowed to be written only as the run waits for it: when the next one is pruned.
    order = [f"{what} {number}" for number in range(BLOCKS) for what in ("prune", "pruned")]
    assert [each for each in happened if "write" not in each] == order
    for number in range(BLOCKS - 1):
        assert happened.index(f"pruned {number + 1}") < happened.index(f"write {number}")
        # No block is begun while two are in memory.
        assert happened.index(f"write {number}") < happened.index(f"pruned {number + 1}") + 2
    assert kinds(records) == kinds(expected[1])
    same_bytes(tmp_path / "out", expected[0])


def test_records_come_as_soon_as_they_are_there(model, expected, held, tmp_path):
    """Where writing is fast, a block's record does not wait for the end of the next one."""
    happened, may = held
    for each in may:
        each.set()
    records = []
    for record in run(planned(model, tmp_path / "out")):
        records.append(record)
        if record.kind == "layer":
            time.sleep(0.02)
        if record.kind == "block":
            happened.append(f"record {record.values['index']}")
    for number in range(BLOCKS - 1):
        assert happened.index(f"record {number}") < happened.index(f"pruned {number + 1}")
    assert kinds(records) == kinds(expected[1])


def test_the_journal_names_a_block_after_its_file(model, held, tmp_path, monkeypatch):
    _, may = held
    for each in may:
        each.set()
    append, seen = shards.OutputFolder.append_journal, []

    def check(self, kind, name, values):
        if kind == "block" and ("block", name) not in self.journal:
            seen.append(all((self.folder / file).is_file() for file in values["files"]))
        append(self, kind, name, values)

    monkeypatch.setattr(shards.OutputFolder, "append_journal", check)
    [*run(planned(model, tmp_path / "out"))]
    assert seen == [True] * BLOCKS


def test_an_error_of_the_writer_is_raised_once_with_its_path(model, expected, tmp_path):
    write, calls = shards.ShardWriter.write_block, []

    def fail(self, number, *rest, **options):
        calls.append(number)
        if number == 1:
            raise OSError(5, "Input/output error")
        return write(self, number, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardWriter, "write_block", fail)
        with pytest.raises(OSError, match="Input/output") as caught:
            [*run(planned(model, tmp_path / "out"))]
    (note,) = caught.value.__notes__
    assert f"{tmp_path / 'out'}/shard-00003-of-0000{BLOCKS + 1}.safetensors" in note
    assert calls == [0, 1]
    done = read_journal(tmp_path / "out" / JOURNAL)
    assert [name for kind, name in done if kind == "block"] == ["model.layers.0"]
    [*run(planned(model, tmp_path / "out"), resume=True)]
    same_bytes(tmp_path / "out", expected[0])


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_is_left_finishes_the_block_it_writes(model, expected, held, tmp_path, after):
    _, may = held
    for each in may:
        each.set()
    records = run(planned(model, tmp_path / "out"))
    for record in records:
        if record.kind == "block" and record.values["index"] == after - 1:
            records.close()
    done = read_journal(tmp_path / "out" / JOURNAL)
    assert after <= len([name for kind, name in done if kind == "block"]) <= after + 1
    [*run(planned(model, tmp_path / "out"), resume=True)]
    same_bytes(tmp_path / "out", expected[0])
