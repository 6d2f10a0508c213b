"""Local folders are preferred; a missing checkpoint is named."""

import pytest

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.errors import CheckpointError


def test_a_local_folder_is_found_before_the_hub_is_asked(single):
    assert checkpoint_folder(str(single)) == single


def test_says_that_there_is_neither_a_folder_nor_a_repository():
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: there is no such folder, and"):
        checkpoint_folder("nobody/nothing")
