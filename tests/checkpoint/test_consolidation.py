"""Consolidation: one set of bytes, whatever is killed or broken on the way."""

import json
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import consolidation
from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.consolidation import plan_layout, write_index
from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.weight_files import INDEX_FILE
from prunekit.errors import CheckpointError

SHARDS = [
    {"embed": torch.randn(40, 5), "norm": torch.randn(7)},
    {"0.a": torch.randn(30, 3), "0.b": torch.randn(30, 3), "0.c": torch.randn(10).bfloat16()},
    {"1.a": torch.randn(30, 3), "1.b": torch.randn(30, 3)},
    {},
    {"2.a": torch.randn(90, 3)},
]
LIMITS = [400, 900, 1700, 10**9]
"""Bytes of a file: less than most tensors; two shards in three files; …; all in one."""


class Run:
    """A run that writes the shards above and joins them."""

    def __init__(self, folder, limit, *, resume=False):
        self.output = OutputFolder(folder, len(SHARDS), limit=limit)
        self.output.begin("same", resume=resume, overwrite=False)

    def shards(self):
        """Write each shard that no entry names; return their numbers."""
        written = []
        for number, tensors in enumerate(SHARDS, 1):
            if ("block", str(number)) not in self.output.journal:
                files = {"files": self.output.write_shard(number, tensors)}
                self.output.append_journal("block", str(number), files)
                written.append(number)
        return written

    def join(self):
        names = [self.output.shard_path(number).name for number in range(1, len(SHARDS) + 1)]
        joining = consolidation.Consolidation(
            self.output.folder, self.output.journal, self.output.append_journal
        )
        write_index(joining.join(names, self.output.limit))


def finished(folder, limit, *, resume=False):
    run = Run(folder, limit, resume=resume)
    written = run.shards()
    run.join()
    run.output.close()
    return written


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".jsonl"}


@pytest.mark.parametrize("limit", LIMITS)
def test_files_are_within_the_limit_and_hold_every_tensor(tmp_path, limit):
    finished(tmp_path, limit)
    held = {name: value for shard in SHARDS for name, value in shard.items()}
    files = sorted(tmp_path.glob("*.safetensors"))
    total = len(files)
    assert [path.name for path in files] == (
        ["model.safetensors"]
        if total == 1
        else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    )
    for file in files:
        entries = read_header(file)
        assert sum(entry.nbytes for entry in entries.values()) <= limit or len(entries) == 1
        for name, value in load_file(file).items():
            assert torch.equal(value, held.pop(name))
    assert not held
    assert (tmp_path / INDEX_FILE).is_file() == (total > 1)
    if total > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["weight_map"] == {n: f.name for f in files for n in read_header(f)}
        assert index["metadata"]["total_size"] == 4 * (200 + 7 + 4 * 90 + 270) + 20


def test_tensors_are_split_as_the_library_splits_a_model(tmp_path):
    from huggingface_hub import split_torch_state_dict_into_shards

    for number, tensors in enumerate(SHARDS):
        save_file(tensors, tmp_path / f"{number}.safetensors")
    shards = {f"{n}": read_header(tmp_path / f"{n}.safetensors") for n in range(len(SHARDS))}
    model = {name: SHARDS[int(n)][name] for n, entries in shards.items() for name in entries}
    for limit in LIMITS:
        layout = plan_layout(shards, limit)
        expected = split_torch_state_dict_into_shards(model, max_shard_size=limit)
        found = {file: [*chain(*parts.values())] for file, parts in layout.items()}
        assert found == expected.filename_to_tensors


def test_beside_the_checkpoint_there_is_never_more_than_one_file(tmp_path, monkeypatch):
    real, sizes = consolidation.write_joined, []

    def measured(file, entries):
        digest = real(file, entries)
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")))
        return digest

    monkeypatch.setattr(consolidation, "write_joined", measured)
    finished(tmp_path, 900)
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    headers = sum(header_bytes(path) for path in tmp_path.glob("*.safetensors"))
    assert len(sizes) == len(files) > 3
    # A shard that is only in part in finished files is still there, besides the file itself.
    assert max(sizes) <= sum(files) + max(files) + max(map(shard_bytes, SHARDS)) + headers


def header_bytes(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def shard_bytes(tensors):
    return sum(value.nbytes for value in tensors.values())


class Killed(BaseException):
    """Ends a run where it is."""


def killed_at(monkeypatch, moment):
    """Kill before or after any write, entry or removal, the ``moment``-th of these."""
    moments = count()

    def dying(real):
        def step(*arguments, **options):
            if next(moments) == moment:
                raise Killed
            result = real(*arguments, **options)
            if next(moments) == moment:
                raise Killed
            return result

        return step

    monkeypatch.setattr(consolidation, "write_joined", dying(consolidation.write_joined))
    monkeypatch.setattr(OutputFolder, "append_journal", dying(OutputFolder.append_journal))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


@pytest.mark.parametrize("limit", LIMITS)
def test_a_consolidation_that_is_killed_at_any_step_goes_on(tmp_path, monkeypatch, limit):
    finished(tmp_path / "whole", limit)
    expected, kills = content(tmp_path / "whole"), 0
    for moment in count():
        folder = tmp_path / f"{moment}"
        run = Run(folder, limit)
        run.shards()
        with monkeypatch.context() as patch:
            killed_at(patch, moment)
            try:
                run.join()
            except Killed:
                kills += 1
            else:
                run.output.close()
                break
        run.output.close()
        assert not finished(folder, limit, resume=True), "work was repeated"
        assert content(folder) == expected
    assert kills > 8


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("harm", ["cut off", "removed"])
def test_a_weight_file_that_breaks_is_made_again_from_the_work_that_it_held(tmp_path, limit, harm):
    finished(tmp_path / "whole", limit)
    expected = content(tmp_path / "whole")
    for name in [name for name in expected if name.endswith(".safetensors")]:
        folder = tmp_path / name
        finished(folder, limit)
        held = {*read_header(folder / name)}
        file = folder / name
        file.write_bytes(file.read_bytes()[:-1]) if harm == "cut off" else file.unlink()
        again = finished(folder, limit, resume=True)
        assert again == [n for n, tensors in enumerate(SHARDS, 1) if held & tensors.keys()]
        assert content(folder) == expected


@pytest.mark.parametrize("limit", [900, 10**9])
def test_tensors_of_a_shard_are_read_wherever_they_are(tmp_path, limit):
    run = Run(tmp_path, limit)
    run.shards()
    for joined in (False, True):
        if joined:
            run.join()
        for number, tensors in enumerate(SHARDS, 1):
            found = run.output.read_shard(number)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(value, tensors[name]) for name, value in found.items())
    run.output.close()


def test_another_limit_counts_until_the_first_shard_is_gone(tmp_path, monkeypatch):
    """A disk that was too full for one file can be resumed with smaller ones."""
    run = Run(tmp_path / "out", 10**9)
    run.shards()
    with monkeypatch.context() as patch:
        patch.setattr(consolidation, "write_joined", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run.join()
    run.output.close()
    assert not finished(tmp_path / "out", 900, resume=True)
    finished(tmp_path / "whole", 900)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not finished(tmp_path / "out", 10**9, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_files_of_another_layout_are_removed(tmp_path, monkeypatch):
    run = Run(tmp_path / "out", 10**9)
    run.shards()
    with monkeypatch.context() as patch:
        patch.setattr(consolidation.Consolidation, "_remove", lambda *_: None)
        run.join()
    run.output.close()
    assert (tmp_path / "out/model.safetensors").is_file()
    finished(tmp_path / "out", 900, resume=True)
    finished(tmp_path / "whole", 900)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    again = Run(tmp_path / "out", 900, resume=True)
    assert "model.safetensors" not in again.output.files
    again.output.close()


@pytest.mark.parametrize(("first", "then"), [(800, 840), (1700, 400), (900, 10**9)])
def test_a_consolidation_that_goes_on_with_another_limit_has_one_layout(
    tmp_path, monkeypatch, first, then
):
    """That of either limit, wherever the first was killed: no tensor is lost or doubled."""
    for limit in (first, then):
        finished(tmp_path / f"whole-{limit}", limit)
    expected = [content(tmp_path / f"whole-{limit}") for limit in (first, then)]
    for moment in count():
        folder = tmp_path / f"{moment}"
        run = Run(folder, first)
        run.shards()
        with monkeypatch.context() as patch:
            killed_at(patch, moment)
            try:
                run.join()
            except Killed:
                pass
            else:
                break
            finally:
                run.output.close()
        assert not finished(folder, then, resume=True), "work was repeated"
        assert content(folder) in expected
    assert moment > 8


def test_a_finished_file_with_other_tensors_than_the_layout_says_is_made_again(tmp_path):
    """As an earlier version left it, which resumed with another limit."""
    run = Run(tmp_path / "out", 10**9)
    run.shards()
    shards = sorted((tmp_path / "out").glob("shard-*"))
    headers = {shard.name: read_header(shard) for shard in shards}
    layout = plan_layout(headers, 10**9)
    ((file, sources),) = layout.items()
    held = {name: headers[shard][name] for shard, names in sources.items() for name in names[1:]}
    digest = consolidation.write_joined(tmp_path / "out" / file, held)
    run.output.append_journal(*consolidation.LAYOUT, {"layout": layout, "writes": [file]})
    made_of = {shard.name: file_sha256(shard) for shard in shards if shard.name in sources}
    values = {"files": {file: digest}, "shards": made_of}
    run.output.append_journal(consolidation.WEIGHTS, file, values)
    run.join()
    run.output.close()
    finished(tmp_path / "whole", 10**9)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_shard_that_nobody_has_is_an_error(tmp_path):
    run = Run(tmp_path, 10**9)
    run.shards()
    run.output.shard_path(2).unlink()
    with pytest.raises(CheckpointError, match="a shard is missing that the run wrote"):
        run.join()
    run.output.close()
