"""Time estimates of runs over units."""

import pytest

from prunekit.runs.structured.time_estimate import estimate_time
from tests.support.structured import planned


@pytest.mark.parametrize(
    ("prune", "none"),
    [
        ('method = "obs"\npattern = "heads"', {"backward"}),
        ('method = "hybrid"\npattern = ["heads", "neurons"]', set()),
        ('method = "gradient"\npattern = "blocks"', {"gathering", "solving"}),
    ],
)
def test_every_kind_of_work_that_is_done_takes_time(llama, tmp_path, prune, none):
    found = estimate_time(planned(llama, tmp_path / "out", f"{prune}\nsparsity = 0.34"))
    assert {name for name, seconds in found.parts.items() if not seconds} == none
    assert found.total == sum(found.parts.values()) > 0
