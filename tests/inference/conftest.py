"""Fixture: a pruned model stored in every format."""

import pytest
import torch

import prunekit
from prunekit.inference.convert import convert
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="session")
def sparse_folders(tmp_path_factory):
    """A folder with one pruned model stored as dense, 2:4 and bitmask."""
    folder = tmp_path_factory.mktemp("sparse")
    checkpoints.write(folder / "m", dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        list(prunekit.run(planned(folder / "m", folder / "dense")))
    for kind in ("2:4", "bitmask"):
        convert(folder / "dense", folder / kind, kind)
    return folder
