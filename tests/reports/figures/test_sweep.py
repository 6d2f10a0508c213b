"""Figures and tables of a sweep."""

import csv

import pytest

from prunekit.reports.figures import sweep


def run(name, sparsity, value, **facts):
    return {
        "name": f"{name}-{sparsity}",
        "series": name,
        "sparsity": sparsity,
        "achieved": sparsity,
        "evaluation": [{"data": "text", "metric": "perplexity", "value": value}],
        "active": {"heads": 2},
        "whole": {"heads": 4},
        "parameters": 50,
        "bytes": 200,
        "peak_device_bytes": 0,
        "peak_rss_bytes": 1000,
        **facts,
    }


@pytest.fixture
def report():
    dense = run("", 0.0, 2.0)
    for key in ("name", "series", "sparsity", "achieved", "active", "whole", "parameters"):
        del dense[key]
    runs = [run("obs", 0.5, 4.0), run("obs", 0.25, 3.0), run("flap", 0.5, "3.5")]
    return {"model": {"parameters": 100}, "dense": dense, "runs": runs}


def test_points_of_a_line_are_ordered_by_sparsity(report):
    first = sweep.page(report)["pictures"][0]
    assert first.title == "Perplexity on text"
    assert list(first.rows) == [
        {"series": "dense", "sparsity": 0.0, "Perplexity on text": 2.0},
        {"series": "obs", "sparsity": 0.25, "Perplexity on text": 3.0},
        {"series": "obs", "sparsity": 0.5, "Perplexity on text": 4.0},
        {"series": "flap", "sparsity": 0.5, "Perplexity on text": 3.5},
    ]
    assert "the dense model, 2.00" in first.caption


def test_the_best_run_of_each_sparsity_has_the_lowest_perplexity(report):
    best = sweep.page(report)["best"]
    assert [(level, run["series"]) for level, run in best] == [(0.25, "obs"), (0.5, "flap")]


def test_of_fractions_of_samples_the_highest_is_the_best(report):
    for each in (report["dense"], *report["runs"]):
        each["evaluation"][0] |= {"metric": "accuracy"}
    page = sweep.page(report)
    assert [(level, run["series"]) for level, run in page["best"]] == [(0.25, "obs"), (0.5, "obs")]
    assert page["measures"][0].write(0.5) == "50.00 %"
    assert page["measures"][0].caption == "Higher is better."


def test_the_table_begins_with_the_dense_model(report):
    rows = list(csv.DictReader(sweep.table(report).splitlines()))
    assert [row["run"] for row in rows] == ["dense", "obs-0.5", "obs-0.25", "flap-0.5"]
    assert [row["Active heads"] for row in rows] == ["4", "2", "2", "2"]
    assert [row["Parameters"] for row in rows] == ["100", "50", "50", "50"]


def test_speed_and_text_are_shown_only_where_they_were_measured(report):
    titles = [measure.title for measure in sweep.page(report)["measures"]]
    assert titles == ["Perplexity on text", "Peak memory", "Files", "Active heads", "Parameters"]
    speed = {"decode": 10.0, "prefill": 20.0, "lexical_diversity": 0.5, "repetition": 0.1}
    for each in (report["dense"], *report["runs"]):
        each.update(speed)
    titles = [measure.title for measure in sweep.page(report)["measures"]]
    assert titles[1:3] == ["Tokens/s written", "Tokens/s read"]
    assert titles[-2:] == ["Lexical diversity", "Repetition"]


def test_colors_repeat_after_the_last(report):
    report["runs"] = [run(f"series {i}", 0.5, 3.0) for i in range(len(sweep.COLOURS) + 1)]
    legend = sweep.page(report)["legend"]
    assert legend[0][1] == legend[-1][1] != legend[1][1]


def test_agreement_of_rankers_is_a_matrix_of_both_names(report):
    report["agreement"] = [
        {"kind": "heads", "rankers": ["obs", "flap"], "spearman": [[1.0, -0.5], [-0.5, 1.0]]}
    ]
    last = sweep.page(report)["pictures"][-1]
    assert last.title == "How far rankers of heads agree"
    assert last.rows[1] == {"ranker": "obs", "other": "flap", "Spearman's ρ": -0.5}
