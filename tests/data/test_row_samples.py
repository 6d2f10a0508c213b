"""Inputs that are made row by row."""

import pytest
import torch

from prunekit.data.row_samples import RowSamples, first_row_has, named_file, sample_rows
from prunekit.errors import ConfigError


def inputs_of(count):
    return {"input_ids": torch.full((1, count), count)}


def test_lengths_and_sizes_are_those_of_the_rows():
    found = RowSamples([inputs_of(2), inputs_of(5)], "")
    assert (len(found), found.lengths, found.tokens, found.longest) == (2, [2, 5], 7, 5)
    assert found.nbytes == 8 * 7
    assert found.even_batches(1) == found.batches(1) == found.rows


def test_longer_rows_are_replaced_by_others():
    found = sample_rows(range(1, 9), inputs_of, ["a.jsonl"], 3, 4, seed=0)
    assert len(found) == 3
    assert found.longest <= 4
    assert sample_rows(range(1, 9), inputs_of, ["a.jsonl"], 3, 4, seed=0).digest == found.digest
    with pytest.raises(ConfigError, match="each row has more than 1 tokens, the shortest 5"):
        sample_rows(range(5, 9), inputs_of, ["a.jsonl"], 3, 1, seed=0)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.jsonl: cannot be read: No such file"):
        first_row_has(str(tmp_path / "missing.jsonl"), "image")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert not first_row_has(str(tmp_path / "empty.jsonl"), "image")
    (tmp_path / "list.jsonl").write_text("[]")
    assert not first_row_has(str(tmp_path / "list.jsonl"), "image")


def test_a_file_that_a_row_names_may_lie_outside_of_its_folder(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "a.png").touch()
    source = str(tmp_path / "rows/a.jsonl")
    for name in ("../a.png", str(tmp_path / "a.png")):
        assert named_file(source, name, "a.jsonl:1").samefile(tmp_path / "a.png")
    for name in ("a.png", "..", "", "x" * 5000, "a/" * 5000, "a\0b", "\ud800"):
        with pytest.raises(ConfigError, match=r"^a\.jsonl:1: .* no such file$") as error:
            named_file(source, name, "a.jsonl:1")
        assert len(str(error.value)) < 500
