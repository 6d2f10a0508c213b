"""Figures of single heads."""

import re

import pytest

from prunekit.reports.figures import heads


def similar(value, size=2):
    return [[1.0 if i == j else value for j in range(size)] for i in range(size)]


def view(head, kept):
    return {
        "layer": "model.layers.1.self_attn",
        "head": head,
        "unit": head,
        "score": 0.5,
        "kept": kept,
        "attention": [[1.0, 0.0], [0.25, 0.75]],
        "activity": [0.1, 0.2],
    }


@pytest.fixture
def report():
    redundancy = {f"model.layers.{i}.self_attn": similar(i / 10) for i in range(6)}
    redundancy["model.layers.6.self_attn"] = [[1.0]]
    views = {"tokens": [" the", " "], "heads": [view(0, kept=True), view(3, kept=False)]}
    return {"views": {**views, "redundancy": redundancy}}


def test_a_report_without_views_has_no_figures():
    assert heads.head_figures({}) == heads.head_figures({"views": None}) == []


def test_each_head_has_a_map_that_says_whether_it_is_kept(report):
    first, second = heads.head_figures(report)[:2]
    assert first.title == "Attention of block 1, head 0, kept"
    assert second.title == "Attention of block 1, head 3, removed"
    assert "score 0.500" in second.caption


def test_masked_positions_are_left_out(report):
    first = heads.head_figures(report)[0]
    assert [(row["query"], row["key"]) for row in first.rows] == [(0, 0), (1, 0), (1, 1)]


def test_output_norms_are_those_of_all_heads(report):
    norms = heads.head_figures(report)[2]
    assert [row["norm"] for row in norms.rows] == [0.1, 0.2, 0.1, 0.2]
    assert norms.rows[-1]["head"] == "block 1, head 3, removed"


def test_redundancy_is_that_of_the_most_similar_layers_in_order(report):
    titles = [figure.title for figure in heads.head_figures(report)[3:]]
    assert titles == [f"Redundancy between heads, block {block}" for block in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("token", "label"),
    [(" the", "the"), ("  ", "␣␣"), ("\n", "\\n"), ("", "·"), ("a" * 20, "a" * 9 + "…")],
)
def test_tokens_have_short_visible_labels(report, token, label):
    report["views"]["tokens"][0] = token
    svg = heads.head_figures(report)[0].svg or ""
    assert re.findall("<title>([^→<]*) →", svg)[0] == label
