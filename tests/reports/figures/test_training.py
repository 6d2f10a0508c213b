"""Curves of a training: what is drawn, said and stored of a history."""

import re

import pytest

from prunekit.reports.figures import training

HISTORY = [
    {"step": 0, "loss": None, "held_out": 4.0, "rate": None, "sparsity": 0.0, "achieved": 0.0},
    {"step": 10, "loss": 3.5, "held_out": None, "rate": 1e-4, "sparsity": 0.4, "achieved": 0.39},
    {"step": 20, "loss": 3.2, "held_out": 3.0, "rate": 1e-5, "sparsity": 0.7, "achieved": 0.69},
]
GRADUAL = {"base": 2.0, "post": None, "final": 3.0, "recovery": None, "history": HISTORY}


def tooltips(picture):
    return re.findall("<title>(.*?)</title>", picture.svg)


@pytest.mark.parametrize(
    ("recovery", "text"),
    [
        (0.5, "50.0 % of the loss recovered"),
        (None, "nothing had been lost"),
        (1.5, "more than pruning had added is gone"),
    ],
)
def test_the_loss_of_held_out_text_is_compared_with_that_of_the_dense_model(recovery, text):
    history = [{key: step[key] for key in ("step", "loss", "held_out")} for step in HISTORY]
    summary = {"base": 2.0, "post": 4.0, "final": 3.0, "recovery": recovery, "history": history}
    (picture,) = training.pictures(summary)
    assert tooltips(picture) == ["step 0, held-out loss: 4.00", "step 20, held-out loss: 3.00"]
    assert "2.00 dense (dashed), 4.00 pruned, 3.00 after the training" in picture.caption
    assert text in picture.caption
    assert list(picture.rows) == history


def test_a_schedule_has_curves_of_what_was_asked_for_and_counted():
    loss, sparsity, rate = training.pictures(GRADUAL)
    assert loss.caption.endswith("3.00 at best after the last pruning.")
    assert tooltips(sparsity) == [
        "step 0, counted: 0 %", "step 10, counted: 39.0 %", "step 20, counted: 69.0 %",
    ]  # fmt: skip
    assert [row["asked"] for row in sparsity.rows] == [0.0, 0.4, 0.7]
    assert [meaning for _, meaning in sparsity.legend] == ["counted", "asked for"]
    assert len(tooltips(rate)) == 2


def test_a_sparsity_that_never_changes_is_not_drawn():
    constant = [step | {"sparsity": 0.7, "achieved": 0.69} for step in HISTORY]
    titles = [each.title for each in training.pictures(GRADUAL | {"history": constant})]
    assert titles == ["Loss during training", "Learning rate"]


def test_gates_have_a_curve_for_each_kind_of_units():
    factors = [{"heads": 1.0, "neurons": 1.0}, {"heads": 0.5, "neurons": 0.75}, {"heads": 0.25}]
    history = [step | {"factors": each} for step, each in zip(HISTORY, factors, strict=True)]
    found = {each.title: each for each in training.pictures(GRADUAL | {"history": history})}
    picture = found["Mean gate factor"]
    assert [meaning for _, meaning in picture.legend] == ["heads", "neurons"]
    assert len(tooltips(picture)) == 5
    assert training.rows(GRADUAL | {"history": history})[1] == {
        "step": 10, "loss": 3.5, "held_out": None, "rate": 1e-4, "asked": 0.4, "counted": 0.39,
        "factor of heads": 0.5, "factor of neurons": 0.75,
    }  # fmt: skip


def test_a_long_training_is_drawn_in_part_and_stored_whole():
    steps = range(1000)
    history = [{"step": step, "loss": 1.0, "held_out": 2.0 - step / 1000} for step in steps]
    (picture,) = training.pictures(GRADUAL | {"history": history})
    drawn = tooltips(picture)
    assert len(drawn) == training.POINTS
    assert (drawn[0], drawn[-1]) == ("step 0, held-out loss: 2.00", "step 999, held-out loss: 1.00")
    assert len(picture.rows) == len(training.rows(GRADUAL | {"history": history})) == 1000


def test_a_distillation_has_a_curve_of_each_of_its_losses():
    losses = [{}, {"prediction": 0.5, "layer": 2.0}, {"prediction": 0.25, "layer": 1.5}]
    history = [
        {key: value for key, value in (step | {"distillation": each}).items() if value}
        | {"loss": step["loss"], "held_out": step["held_out"]}
        for step, each in zip(HISTORY, losses, strict=True)
    ]
    history[0]["step"] = 0
    found = {each.title: each for each in training.pictures(GRADUAL | {"history": history})}
    picture = found["Distance from the teacher"]
    assert tooltips(picture) == [
        "step 10, prediction: 0.500", "step 20, prediction: 0.250",
        "step 10, layer: 2.00", "step 20, layer: 1.50",
    ]  # fmt: skip
    assert [meaning for _, meaning in picture.legend] == ["prediction", "layer"]
    rows = training.rows(GRADUAL | {"history": history})
    assert [row["layer loss"] for row in rows] == [None, 2.0, 1.5]
    assert "Distance from the teacher" not in {each.title for each in training.pictures(GRADUAL)}
