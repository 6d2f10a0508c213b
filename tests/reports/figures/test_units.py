"""Heat maps of units."""

import re

from prunekit.reports.figures import units


def layer(block, kept, **facts):
    return {
        "name": f"model.layers.{block}.self_attn",
        "kind": "heads",
        "units": 2,
        "kept": kept,
        "scores": [0.1 + block, 0.2 + block],
        **facts,
    }


def tooltips(picture):
    return re.findall("<title>([^<]*)", picture.svg)


def test_scores_are_drawn_as_fractions_of_lower_scores():
    (scores,) = units.maps([layer(0, [1]), layer(1, [0, 1])], {})
    assert scores.title == "Heads by score"
    assert "Framed: the 1 removed heads." in scores.caption
    assert tooltips(scores) == [
        "model.layers.0.self_attn, 0: score 0, removed",
        "model.layers.0.self_attn, 1: score 0.333, kept",
        "model.layers.1.self_attn, 0: score 0.667, kept",
        "model.layers.1.self_attn, 1: score 1.00, kept",
    ]
    assert scores.svg.count(units.REMOVED_COLOR) == 1


def test_equal_scores_have_equal_fractions():
    (scores,) = units.maps([{**layer(0, [0]), "scores": [1.0, 1.0]}], {})
    assert [tip.split("score ")[1] for tip in tooltips(scores)] == ["0, kept", "0, removed"]


def test_losses_and_entropies_are_drawn_where_they_were_measured():
    layers = [layer(0, [1], truth=[0.5, 1.5], entropy=[0.25, 0.75])]
    titles = [picture.title for picture in units.maps(layers, {"heads": 0.5})]
    assert titles == ["Heads by score", "Loss without each of the heads", "Attention entropy"]
    loss, entropy = units.maps(layers, {"heads": 0.5})[1:]
    assert "Spearman's ρ of both is 0.500" in loss.caption
    assert [row["rise"] for row in loss.rows] == [0.5, 1.5]
    assert [row["entropy"] for row in entropy.rows] == [0.25, 0.75]


def test_heads_of_one_unit_share_its_outcome():
    """With grouped-query attention, four heads are two units."""
    layers = [layer(0, [1], entropy=[0.1, 0.2, 0.3, 0.4])]
    outcomes = [tip.rpartition(" ")[2] for tip in tooltips(units.maps(layers, {})[1])]
    assert outcomes == ["removed", "removed", "kept", "kept"]


def test_layers_with_too_many_units_are_not_drawn(monkeypatch):
    monkeypatch.setattr(units, "LARGEST", 1)
    assert units.maps([layer(0, [1])], {}) == []


def test_rows_name_every_unit():
    place = {"layer": "model.layers.1.self_attn", "kind": "heads"}
    assert units.rows([layer(1, [1])]) == [
        {**place, "unit": 0, "score": 1.1, "kept": False},
        {**place, "unit": 1, "score": 1.2, "kept": True},
    ]
