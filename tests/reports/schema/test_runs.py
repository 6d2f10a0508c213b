"""Reports of single runs, whose parts have to fit together."""

import copy
import json

import pytest
from pydantic import ValidationError

from prunekit.reports.schema.runs import SparsifyReport, Units, UnitsReport, Views
from tests.conftest import ROOT

EXAMPLE = json.loads((ROOT / "tests/support/example_report.json").read_text())
UNITS = {
    "name": "model.layers.0.self_attn",
    "kind": "heads",
    "units": 4,
    "kept": [0, 2, 3],
    "sparsity": 0.25,
    "parameters": 100,
    "scores": [1.0, "nan", 3, "inf"],
}
VIEWS = {
    "tokens": ["a", "b"],
    "heads": [
        {
            "layer": "model.layers.0.self_attn",
            "head": 1,
            "score": 0.5,
            "attention": [[1.0, 0.0], [0.5, 0.5]],
            "activity": [0.1, 0.2],
            "kept": True,
        }
    ],
    "redundancy": {"model.layers.0.self_attn": [[1.0]]},
}
REMOVAL = {
    "prunekit": "1",
    "model": {},
    "kind": "units",
    "sparsity": {
        "achieved": 0.25,
        "pattern": "heads",
        "removed": {"heads": [1, 4]},
        "parameters": [100, 75],
        "whole_model": 0.25,
    },
    "layers": [UNITS],
    "views": VIEWS,
}


@pytest.fixture
def removal():
    return copy.deepcopy(REMOVAL)


def test_a_report_of_removed_units_is_accepted(removal):
    assert UnitsReport.model_validate(removal).layers[0].kept == [0, 2, 3]


@pytest.mark.parametrize("kept", [[0, 0], [4], [1, 2, 3, 4]])
def test_kept_units_are_different_and_below_their_number(kept):
    with pytest.raises(ValidationError, match="not a list of different units below units"):
        Units.model_validate(UNITS | {"kept": kept})


@pytest.mark.parametrize("key", ["scores", "truth"])
def test_each_unit_has_one_score(key):
    with pytest.raises(ValidationError, match=f"{key} has 3 values for 4 units"):
        Units.model_validate(UNITS | {key: [1.0, 2.0, 3.0]})


def test_a_layer_is_listed_once(removal):
    removal["layers"] *= 2
    with pytest.raises(ValidationError, match="self_attn is listed twice"):
        UnitsReport.model_validate(removal)
    example = EXAMPLE | {"layers": EXAMPLE["layers"][:1] * 2}
    with pytest.raises(ValidationError, match="q_proj is listed twice"):
        SparsifyReport.model_validate(example)


@pytest.mark.parametrize("change", [{"activity": [0.1]}, {"attention": [[1.0, 0.0]]}])
def test_a_head_is_shown_for_each_token(removal, change):
    removal["views"]["heads"][0] |= change
    with pytest.raises(ValidationError, match=r"a head of .* is not shown for 2 tokens"):
        UnitsReport.model_validate(removal)


def test_redundancy_compares_all_pairs(removal):
    removal["views"]["redundancy"]["model.layers.0.self_attn"] = [[1.0, 0.0]]
    with pytest.raises(ValidationError, match=r"redundancy of .* is not a square"):
        Views.model_validate(removal["views"])


@pytest.mark.parametrize("proof", [{"ids": [[1], [2]]}, {"dtype": "int8"}, {"answers": [1e39]}])
def test_a_proof_is_one_row_of_tokens_and_float32_outputs(proof):
    example = EXAMPLE | {"proof": EXAMPLE["proof"] | proof}
    with pytest.raises(ValidationError, match="proof"):
        SparsifyReport.model_validate(example)


def test_files_are_inside_of_the_folder():
    example = EXAMPLE | {"files": {"../model.safetensors": "0"}}
    with pytest.raises(ValidationError, match="outside of the folder"):
        SparsifyReport.model_validate(example)
