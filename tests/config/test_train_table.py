"""``[train]``: its adapter, and how it goes with the other tables."""

from prunekit.config.train_table import Adapter, Train
from tests.support.configs import GOOD, prune

WEIGHTS = 'method = "magnitude"\npattern = "unstructured"\nsparsity = 0.7\n'


def test_training_stands_beside_weights_and_needs_a_text(load, mistakes):
    assert load(f"{GOOD}[train]\n").train == Train()
    said = mistakes(prune(f"{WEIGHTS}[train]\n", rest=""))[0]
    assert (
        "calibration.data: missing. Calibration text: files (.txt, .jsonl, .jsonl.gz, .parquet), "
        "pydoc:train, hub:NAME:SPLIT; or self: text that the dense model generates without a "
        "prompt, with the whole model in memory."
    ) in said
    assert said.endswith(
        "With task: files (.tsv, .csv, .jsonl, .jsonl.gz, .parquet) or hub:NAME:SPLIT."
    )


def test_all_that_contradicts_a_training_is_said_at_once(mistakes):
    rest = '[calibration]\ndata = "pydoc:train"\nsamples = 8\nhidden = "disk"\nlength = 1\n'
    text = prune('method = "wanda"\npattern = "2:4"\nrecover = "lowrank"\nend = 600\n', rest=rest)
    text = text.replace("end = 600\n", "") + "[train]\nheld_out = 8\n"
    assert mistakes(text) == [
        'config.toml:4: prune.recover: "lowrank" writes an adapter for the weights before [train], '
        "not after. Remove it; to train an adapter, set train.adapter.",
        "config.toml:9: calibration.hidden: does not apply with [train], which holds the whole "
        "model in memory.",
        "config.toml:10: calibration.length: a sample of 1 token has none to predict; [train] "
        "needs 2 or more.",
        "config.toml:16: train.held_out: 8 of 8 calibration samples leave none to train on.",
    ]


def test_an_adapter_has_a_rank_and_targets(load, mistakes):
    (adapter,) = [load(f"{GOOD}[train]\nadapter = {{ rank = 4 }}\n").train.adapter]
    assert adapter == Adapter(rank=4, targets=["all-linear"])
    found = load(f'{GOOD}[train.adapter]\ntargets = "q_proj"\n').train.adapter
    assert found == Adapter(rank=8, targets=["q_proj"])
    assert mistakes(f'{GOOD}[train]\nadapter = {{ rank = 0, target = ["q"] }}\n') == [
        "config.toml:12: train.adapter.rank: 0 is not possible: at least 1.",
        'config.toml:12: train.adapter.target: no such key. Did you mean "targets"?',
    ]
    assert mistakes(f"{GOOD}[train]\nadapter = 4\n") == [
        "config.toml:12: train.adapter: 4 is not a table.",
    ]


def test_every_key_of_an_adapter_is_explained():
    assert all(field.description for field in Adapter.model_fields.values())
