"""Errors of other libraries that say that memory is used up."""

import errno

import pytest
import torch

from prunekit.errors import is_out_of_memory
from tests.support.exhaustion import ERRORS


@pytest.mark.parametrize("library", ERRORS)
def test_a_failed_allocation_of_a_library_is_known(library):
    assert is_out_of_memory(ERRORS[library]())


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)"), True),
        (RuntimeError("OutOfMemoryError: CUDA out of memory."), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError("MemoryError"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
    ],
    ids=repr,
)
def test_other_errors_are_told_apart(error, known):
    assert is_out_of_memory(error) == known
