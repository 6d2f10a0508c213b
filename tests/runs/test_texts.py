"""Labelled rows in runs of every kind: planned, calibrated on, trained on, evaluated."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prunekit.config.run_config import Config, StructuredConfig
from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.runs.jobs import plan, run
from prunekit.runs.texts import calibration_data, data_words, own_batches
from tests.support import checkpoints
from tests.support.labelled import SENTENCES, WORDS, sentences, words, write_rows


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    checkpoints.write(folder, "bert", head=AutoModelForSequenceClassification)
    sentences(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = checkpoints.write(tmp_path_factory.mktemp("t5"), "t5")
    words(folder)
    return folder


def configured(folder, output, **sections):
    """Return a config that calibrates and evaluates on the rows of a folder."""
    (file,) = folder.glob("*.tsv")
    task = "seq2seq" if file.name == "words.tsv" else "classification"
    values = {
        "model": {"path": str(folder), "device": "cpu"},
        "calibration": {"task": task, "data": str(file)},
        "evaluate": {"task": task, "data": str(file)},
        "output": {"path": str(output)},
        **sections,
    }
    units = values["prune"]["pattern"] in ("heads", "neurons")
    return (StructuredConfig if units else Config).model_validate(values)


HEADS = {"method": "gradient", "pattern": "heads", "sparsity": 0.25}
WANDA = {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5}
TRAIN = {"steps": 4, "batch": 2, "held_out": 2, "every": 2}


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        ("bert", {"prune": HEADS}),
        ("bert", {"prune": HEADS | {"method": "salience", "compensate": "refit", "truth": True}}),
        ("bert", {"prune": HEADS, "train": TRAIN}),
        ("bert", {"prune": WANDA}),
        ("bert", {"prune": WANDA | {"method": "sparsegpt"}, "train": TRAIN}),
        ("bert", {"prune": WANDA | {"end": 3}, "train": TRAIN}),
        ("t5", {"prune": HEADS | {"method": "hybrid"}, "train": TRAIN}),
        ("t5", {"prune": WANDA | {"method": "sparsegpt"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_runs_measure_before_and_after(request, tmp_path, model, sections):
    folder = request.getfixturevalue(model)
    records = list(run(plan(configured(folder, tmp_path / "out", **sections))))
    first = "accuracy" if model == "bert" else "exact match"
    measured = [(each.values["metric"], each.values["which"]) for each in records
                if each.kind == "evaluation"]  # fmt: skip
    assert measured == [
        (metric, which) for which in ("before", "after") for metric in (first, "loss")
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    fraction, loss = report["evaluation"]
    assert fraction["samples"] == (len(SENTENCES) if model == "bert" else len(WORDS))
    assert fraction["before"] == fraction["correct"]["before"] / fraction["samples"]
    assert 0 < loss["before"] < 20
    assert report["calibration"]["samples"] == fraction["samples"]
    assert report["calibration"]["tokens"] < fraction["samples"] * report["calibration"]["length"]
    if "train" in sections:
        assert report["training"]["steps"] == 4


def test_a_resumed_run_measures_only_what_is_missing(bert, tmp_path):
    config = configured(bert, tmp_path / "out", prune=WANDA)
    stopped = run(plan(config))
    for record in stopped:
        if record.kind == "evaluation":
            stopped.close()
            break
    records = list(run(plan(config), resume=True))
    assert sum(record.kind == "evaluation" for record in records) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {
                "calibration": {
                    "task": "seq2seq",
                    "columns": {"input": "sentence", "target": "label"},
                }
            },
            r'^calibration\.task: "seq2seq" needs an encoder-decoder',
        ),
        (
            {"evaluate": {"task": "classification", "columns": {"label": "gold"}}},
            r"^evaluate\.data: .*sentences.tsv: no column 'gold'; there are: sentence, label",
        ),
        ({"evaluate": {}}, r"has no perplexity.*or set evaluate\.task"),
        ({"calibration": {}}, r"gradient asks how well the model predicts.*set calibration\.task"),
    ],
)
def test_what_does_not_fit_is_refused_at_plan_time(bert, tmp_path, changed, message):
    ((table, keys),) = changed.items()
    file = "sentences.tsv" if keys else "text.txt"
    section = {table: {"data": str(bert / file), **keys}}
    with pytest.raises(ConfigError, match=message):
        plan(configured(bert, tmp_path / "out", **{"prune": HEADS, **section}))
    assert not (tmp_path / "out").exists()


def test_a_label_that_is_no_class_is_refused_at_plan_time(bert, tmp_path):
    file = write_rows(tmp_path / "a.csv", ("text", "label"), ("a", 0), ("b", 2))
    data = {"task": "classification", "data": str(file)}
    with pytest.raises(
        ConfigError, match=r"^calibration\.data: .*a\.csv:3: label: '2' is no class"
    ):
        plan(configured(bert, tmp_path / "out", prune=HEADS, calibration=data))


def test_the_plan_says_which_rows_are_read(bert, tmp_path):
    config = configured(bert, tmp_path / "out", prune=HEADS)
    name = f"{bert.name}/sentences.tsv (classification)"
    assert data_words(config, (64, 64)) == {
        "calibration": f"128 rows of at most 64 tokens, seed 0, {name}",
        "evaluate": f"accuracy and loss on all rows of {name}",
    }
    assert not any("shortened" in note for note in plan(config).notes)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_have_the_batches_of_one_process(bert, tmp_path, size):
    planned = plan(configured(bert, tmp_path / "out", prune=WANDA))
    data = calibration_data(planned)
    cpu = torch.device("cpu")
    whole = [row.tolist() for batch in own_batches(data, cpu) for row in batch["input_ids"]]
    shared = [
        row.tolist()
        for rank in range(size)
        for batch in own_batches(data, cpu, Ranks(rank, size))
        for row in batch["input_ids"]
    ]
    assert shared == whole
