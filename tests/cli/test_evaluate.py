"""The command ``evaluate``: its options and output."""

import json

import pytest

from prunekit.cli.main import main


def test_evaluate_wants_to_be_told_what_to_measure(capsys):
    assert main(["evaluate", "model"]) == 2
    assert "needs --data FILE, --tasks NAME or --generate TOKENS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "number", "least"),
    [("--length", "1", 2), ("--windows", "-3", 1), ("--generate", "-1", 0), ("--limit", "0", 1)],
)
def test_evaluate_refuses_numbers_that_cannot_be_meant(capsys, option, number, least):
    assert main(["evaluate", "m", "--data", "pydoc:test", option, number]) == 2
    assert capsys.readouterr().err == f"{option} {number}: must be at least {least}.\n"


def test_evaluate_prints_what_was_measured(replace, capsys):
    def evaluate(*arguments, ranks, stride):
        assert (*arguments, stride) == ("m", ("pydoc:test", "pydoc:train"), 64, 3, 32)
        return [{"data": "a.txt", "metric": "perplexity", "value": 20.7, "protocol": "3 windows"}]

    replace({"evaluation.perplexity": {"evaluate": evaluate}})
    sources = ["--data", "pydoc:test", "--data", "pydoc:train"]
    windows = ["--length", "64", "--windows", "3", "--stride", "32"]
    assert main(["evaluate", "m", *sources, *windows]) == 0
    assert capsys.readouterr().out == "a.txt: perplexity 20.70\n  3 windows\n"


def test_evaluate_measures_labelled_rows(replace, capsys, tmp_path):
    def evaluate_rows(*arguments, ranks):
        assert arguments == ("m", (str(file),), ("seq2seq", {"input": "a", "target": "b"}, 64, 3))
        return [{"data": "a", "metric": "exact match", "value": 0.5, "protocol": "3 rows"}]

    file = tmp_path / "a.csv"
    file.write_text("a,b\n")
    fakes = {"Rows": lambda *given: given, "evaluate_rows": evaluate_rows}
    replace({"evaluation.labelled": fakes})
    rows = ["--task", "seq2seq", "--column.input", "a", "--column.target", "b", "--samples", "3"]
    assert main(["evaluate", "m", "--data", str(file), "--length", "64", *rows]) == 0
    assert capsys.readouterr().out == "a: exact match 50.00 %\n  3 rows\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "3"], "--samples: does not apply without --task."),
        (["--task", "seq2seq", "--windows", "3"], "--windows: does not apply with --task."),
        (["--length", "64", "--stride", "65"], "--stride: does not apply above --length (64)"),
        (["--limit", "3"], "--limit: does not apply without --tasks."),
        (["--few-shot", "0"], "--few-shot: does not apply without --tasks."),
        (["--task", "seq2seq"], "--data pydoc:test: not a supported kind of text. Allowed: .tsv"),
    ],
)
def test_evaluate_refuses_options_of_the_other_kind(capsys, options, message):
    assert main(["evaluate", "m", "--data", "pydoc:test", *options]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_evaluate_names_all_texts_that_are_not_there(capsys):
    assert main(["evaluate", "m", "--data", "no.txt", "--data", "pydoc:x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--data no.txt: no such file.",
        "--data pydoc:x: choose pydoc:train or pydoc:test.",
    ]


def test_programs_get_measures_as_json(replace, capsys):
    measure = {"data": "a", "metric": "perplexity", "value": float("inf"), "protocol": "3 windows"}
    replace({"evaluation.perplexity": {"evaluate": lambda *_, ranks, stride: [measure]}})
    assert main(["evaluate", "m", "--data", "pydoc:test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"evaluation": [measure | {"value": "inf"}], "texts": []}


def test_evaluate_asks_tasks(replace, capsys):
    def evaluate_tasks(*arguments):
        assert arguments == ("m", (("arc_easy", "a.yaml"), 0, 3))
        facts = {"data": "arc_easy", "metric": "acc", "value": 0.5, "stderr": 0.25}
        return [facts | {"protocol": "0-shot"}, facts | {"stderr": None, "protocol": "x"}]

    fakes = {"HarnessTasks": lambda *given: given, "evaluate_tasks": evaluate_tasks}
    replace({"evaluation.harness": fakes})
    tasks = ["--tasks", "arc_easy", "--tasks", "a.yaml", "--few-shot", "0", "--limit", "3"]
    assert main(["evaluate", "m", *tasks]) == 0
    said = capsys.readouterr().out
    assert said == "arc_easy: acc 50.00 % ± 25.00 %\n  0-shot\narc_easy: acc 50.00 %\n  x\n"


def test_windows_of_no_text_are_refused(capsys):
    assert main(["evaluate", "m", "--tasks", "arc_easy", "--stride", "65"]) == 2
    assert capsys.readouterr().err == "--stride: does not apply without --data.\n"
