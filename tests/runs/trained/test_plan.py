"""Arguments of the gradual pruner, from the table ``[prune]``."""

import pytest

from prunekit.config.prune_table import Prune
from prunekit.methods import methods
from prunekit.runs.trained.plan import OF_THE_SCHEDULE, ONLY_ONCE, gradual_settings
from prunekit.training.gradual_settings import gradual_section


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize(
    "pattern",
    [{"pattern": "2:4"}, {"pattern": "unstructured", "sparsity": 0.5, "scope": "row"}],
    ids=lambda pattern: pattern["pattern"],
)
def test_a_gradual_pruner_has_the_settings_of_the_table(method, pattern):
    table = Prune.model_validate({"method": method, "end": 10, "skip": ["*.k_proj"], **pattern})
    settings = gradual_settings(table)
    assert not settings.keys() & (OF_THE_SCHEDULE | ONLY_ONCE)
    name, spelled = settings.pop("method"), settings.pop("pattern")
    section = gradual_section(name, spelled, settings.pop("sparsity", None), settings)
    dumped = section.model_dump()
    shared = table.model_dump().keys() & dumped.keys()
    assert {key: dumped[key] for key in shared} == {key: table.model_dump()[key] for key in shared}
    assert (section.method, section.skip, section.sparsity) == (
        table.method, table.skip, table.sparsity,
    )  # fmt: skip
