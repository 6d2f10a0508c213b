"""Report keys that all runs share."""

import pytest
import torch

from prunekit.data.tokens import Tokens
from prunekit.runs import facts
from tests.support import checkpoints, structured
from tests.support.checkpoints import planned

ENTRY = {"data": "text", "source": "a/text", "metric": "perplexity", "protocol": "windows"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


def test_evaluations_of_a_text_are_joined():
    entries = [
        {**ENTRY, "which": "before", "value": 2.0},
        {**ENTRY, "source": "b/text", "which": "before", "value": 3.0},
        {**ENTRY, "which": "after", "value": 4.0},
    ]
    first, second = facts.paired(entries)
    assert (first["before"], first["after"]) == (2.0, 4.0)
    assert second["before"] == 3.0
    assert "after" not in second
    assert "source" not in first


def test_keys_are_put_in_the_order_of_the_format():
    report = facts.in_report_order({"proof": 1, "layers": 2, "kind": 3, "prunekit": 4})
    assert [*report] == ["prunekit", "kind", "layers", "proof"]
    assert report["layers"] == 2


def test_a_key_without_a_place_is_an_error():
    with pytest.raises(KeyError, match="not in REPORT_KEYS: extra"):
        facts.in_report_order({"prunekit": 1, "extra": 2})


def test_both_kinds_of_plans_have_the_same_frame(folder, tmp_path):
    tokens = Tokens.of(torch.arange(24).view(2, 12), "some text")
    plans = (
        planned(folder, tmp_path / "a"),
        structured.planned(folder, tmp_path / "b", structured.BOTH),
    )
    frames = [facts.report_frame(plan, tokens, [], {"total": 1.0}) for plan in plans]
    assert frames[0].keys() == frames[1].keys() < set(facts.REPORT_KEYS)
    assert frames[0]["calibration"] == frames[1]["calibration"]
    shared = ("path", "architecture", "model_type", "parameters", "blocks")
    for key in shared:
        assert frames[0]["model"][key] == frames[1]["model"][key]
    assert frames[0]["calibration"]["tokens"] == 24


def test_a_run_without_tokens_has_no_calibration(folder, tmp_path):
    plan = planned(folder, tmp_path / "out")
    assert facts.calibration_facts(plan, None) is None
