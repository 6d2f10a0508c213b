"""One table of finished runs: seeds are one row, all else is told apart."""

import statistics

import pytest

from prunekit.errors import ConfigError
from prunekit.reports.compare import compare, spread


def report(method="wanda", before=10.0, after=12.0, seed=0, path="org/tiny", **keys):
    measure = {"metric": "perplexity", "data": "a_b", "protocol": "3 windows."}
    prune = {"method": method, "pattern": "2:4", "sparsity": 0.5} | keys.pop("prune", {})
    return {
        "model": {"path": path},
        "config": {"prune": prune, "calibration": {"seed": seed, "samples": 4} | keys},
        "sparsity": {"achieved": 0.5},
        "evaluation": [measure | {"before": before, "after": after}],
    }


def test_runs_that_differ_in_their_seed_are_one_row():
    seeds = [report(after=value, seed=seed) for seed, value in enumerate((11.0, 12.0, 14.5))]
    table = compare([*seeds, report("ria", after=20.0)])
    assert table.cells() == [
        ["Method", "Pattern", "Sparsity", "Runs", "perplexity, a_b"],
        ["dense", "—", "0 %", "—", "10.00"],
        ["wanda", "2:4", "50.0 %", "3", f"12.50 ± {statistics.stdev((11.0, 12.0, 14.5)):.2f}"],
        ["ria", "2:4", "50.0 %", "1", "20.00"],
    ]
    random = [report("random", prune={"random_seed": seed}) for seed in (1, 2)]
    assert [row.achieved for row in compare(random).rows][1] == [0.5, 0.5]


def test_a_row_names_what_tells_it_from_others_of_its_method():
    runs = [report(samples=4), report(samples=8), report("ria", prune={"power": 1})]
    runs += [report("ria", prune={"power": 2}), report("magnitude")]
    assert [row.method for row in compare(runs).rows] == [
        "dense", "wanda, calibration samples 4", "wanda, calibration samples 8", "ria, power 1",
        "ria, power 2", "magnitude",
    ]  # fmt: skip


def test_several_models_get_a_column_of_their_names():
    table = compare([report(), report(path="org/other", before=7.0)])
    assert table.cells()[0][0] == "Model"
    assert [row[:2] for row in table.cells()[1:]] == [
        ["tiny", "dense"], ["other", "dense"], ["tiny", "wanda"], ["other", "wanda"]
    ]  # fmt: skip


def test_figures_of_other_protocols_are_columns_of_their_own():
    other = report("ria")
    other["evaluation"][0]["protocol"] = "4 windows"
    table = compare([report(), other])
    assert [column.protocol for column in table.columns] == ["3 windows.", "4 windows"]
    assert [row[4:] for row in table.cells()[2:]] == [["12.00", "—"], ["—", "12.00"]]


def test_markdown_and_latex_say_the_same_and_escape_names():
    table = compare([report(after=1.0), report(after=3.0, seed=1)])
    assert table.markdown().splitlines() == [
        "| Method | Pattern | Sparsity | Runs | perplexity, a\\_b |",
        "| --- | --- | --- | --- | --- |",
        "| dense | — | 0 % | — | 10.00 |",
        "| wanda | 2:4 | 50.0 % | 2 | 2.00 ± 1.41 |",
        "",
        "- perplexity, a_b: 3 windows.",
    ]
    lines = table.latex().splitlines()
    assert lines[0] == "% perplexity, a_b: 3 windows."
    assert lines[1:4] == [
        r"\begin{tabular}{llllr}",
        r"\toprule",
        r"Method & Pattern & Sparsity & Runs & perplexity, a\_b \\",
    ]
    assert lines[6] == r"wanda & 2:4 & 50.0 \% & 2 & 2.00 $\pm$ 1.41 \\"
    assert lines[-1] == r"\end{tabular}"


def test_a_sweep_is_compared_with_runs():
    measure = {"metric": "perplexity", "data": "a_b", "protocol": "3 windows."}
    run = {"achieved": 0.5, "evaluation": [measure | {"value": 13.0}]}
    sweep = {
        "kind": "sweep",
        "model": {"path": "org/tiny"},
        "config": {"calibration": {"samples": 4, "length": None}},
        "dense": {"evaluation": [measure | {"value": 10.0}]},
        "runs": [run | {"prune": {"method": "ria", "pattern": "2:4", "sparsity": 0.5}}],
    }
    rows = compare([report(), sweep]).cells()
    assert [row[0] for row in rows[1:]] == ["dense", "wanda", "ria"]
    assert rows[3][-1] == "13.00"


def test_programs_get_every_value():
    found = compare([report(after=1.0), report(after=3.0, seed=1)]).as_dict()
    (measure,) = found["rows"][1]["measures"]
    assert measure["values"] == [1.0, 3.0]
    assert measure["mean"] == 2.0
    assert spread([5.0]) == {"mean": 5.0, "deviation": None}


def test_runs_that_measured_nothing_cannot_be_compared():
    with pytest.raises(ConfigError, match="none of these runs"):
        compare([report() | {"evaluation": []}])
