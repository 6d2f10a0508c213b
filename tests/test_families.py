"""Every model type of the installed transformers has the outcome that is recorded.

A difference after an upgrade of transformers is a change in a family: look at it, then record it
with ``python -m tests.support.families``.
"""

import pytest
import transformers

from tests.support.families import PAGE, README, page, recorded, with_summary
from tests.support.family_configs import cases
from tests.support.family_trial import trial

FEW = (
    "causal:deepseek_v3",
    "causal:gemma4_text",
    "causal:gpt_oss",
    "causal:llama4_text",
    "causal:mamba",
    "causal:nemotron_h",
    "masked:gte",
    "seq2seq:bart",
    "vlm:gemma3",
)
"""One of each kind: keys that blocks share, experts laid out in four ways, states in place of keys,
tensors that transformers converts on loading, two stacks, and a tower."""
TABLE = recorded()


def difference(case, folder):
    """Return the recorded and the present outcome where they differ."""
    now, before = trial(case, folder).dump(), TABLE["outcomes"][case]
    if now["result"] == before["result"] != "works":
        return None  # the words of a reason may change
    return None if now == before else (before, now)


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("case", FEW)
def test_a_family_of_each_kind_works(case, tmp_path):
    assert TABLE["outcomes"][case]["result"] == "works"
    assert difference(case, tmp_path) is None


@pytest.mark.soak
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("case", [*cases()])
def test_every_family_has_its_recorded_outcome(case, tmp_path):
    if TABLE["transformers"] != transformers.__version__:
        pytest.skip(f"recorded with transformers {TABLE['transformers']}")
    assert difference(case, tmp_path) is None


def test_no_family_crashes_or_is_pruned_wrongly():
    results = {outcome["result"] for outcome in TABLE["outcomes"].values()}
    assert results == {"works", "refused", "not built"}


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(TABLE)


def test_the_readme_has_the_summary_of_the_table():
    text = README.read_text("utf-8")
    assert with_summary(text, TABLE) == text
