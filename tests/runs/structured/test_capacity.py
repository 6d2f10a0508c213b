"""Structured runs that do not fit are refused, and the message says what would."""

import pytest

from prunekit.config.load import load_config
from prunekit.errors import CapacityError
from prunekit.runs import jobs, preflight
from tests.support.structured import BOTH, planned, write_config

ADAPTER = '[train.adapter]\nrank = 1\ntargets = ["value"]\n'


def test_the_plan_refuses_too_little_memory(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    coordinates = 'method = "magnitude"\npattern = "hidden"\nsparsity = 0.5'
    for prune in (BOTH, coordinates):
        with pytest.raises(CapacityError, match=r"one block in memory.*fewer or shorter samples"):
            planned(llama, tmp_path / "out", prune)


@pytest.mark.parametrize(
    ("end", "train", "message"),
    [
        (
            "",
            "batch = 2",
            r"trained with the whole model in memory, .* Take a smaller model, lower train.batch, "
            r"set train.checkpoint_activations = true, set train.adapter, .* or start several",
        ),
        (
            "end = 2\n",
            f"batch = 1\ncheckpoint_activations = true\n{ADAPTER}",
            r"heads are ranked with the whole model in memory, .* Take a smaller model, start "
            r"several processes, which can share the weights, or take a ranker that gathers less",
        ),
    ],
    ids=["after", "during"],
)
def test_a_training_that_does_not_fit_says_what_would(
    llama, tmp_path, monkeypatch, end, train, message
):
    heads = f'method = "magnitude"\npattern = "heads"\nsparsity = 0.5\n{end}'
    path = write_config(llama, tmp_path / "out", heads)
    path.write_text(path.read_text() + f"[train]\nheld_out = 2\n{train}\n")
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match=message):
        jobs.plan(load_config(path))
