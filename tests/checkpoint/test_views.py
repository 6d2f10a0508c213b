"""Views: tensors that are computed from others when they are read."""

from dataclasses import replace
from threading import Event

import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.views import TensorView, read_views, stored_tensors
from tests.support import checkpoints


def test_a_view_of_a_view_is_computed_from_the_stored_tensor():
    view = TensorView("a", lambda stored: stored[1:]).then(lambda part: part * 2)
    assert view.stored == "a"
    assert view.of(torch.tensor([1, 2, 3])).tolist() == [4, 6]


def test_names_that_move_up_are_read_from_where_they_were():
    views = {name: TensorView(stored, torch.neg) for name, stored in (("0", "1"), ("1", "2"))}
    assert stored_tensors(["0", "1", "x", "1"], views) == ["1", "2", "x"]
    stored = {name: torch.tensor(value) for name, value in (("1", 1), ("2", 2), ("x", 9))}
    found = read_views(["0", "1", "x"], views, stored)
    assert {name: int(value) for name, value in found.items()} == {"0": -1, "1": -2, "x": 9}


def test_a_checkpoint_reads_its_views(tmp_path):
    folder, read = checkpoints.write(tmp_path / "m"), []
    whole = replace(open_checkpoint(folder), on_read=lambda name, _: read.append(name))
    name, stored = "moved.weight", "model.layers.1.mlp.up_proj.weight"
    views = {name: TensorView(stored, lambda weight: weight[:3])}
    checkpoint = replace(whole, views=views)
    checkpoint.warm_page_cache([name], Event())
    found = checkpoint.read([name, stored])
    assert read == [stored]
    assert torch.equal(found[stored], checkpoints.tensors(folder)[stored])
    assert torch.equal(found[name], found[stored][:3])
