"""With what output.quantize does not go."""

import pytest

from tests.support.configs import prune

SPARSEGPT = 'method = "sparsegpt"\npattern = "2:4"\n'


def text(lines="", output='quantize = "int4"\n'):
    return prune(SPARSEGPT + lines) + output


CASES = {
    "a sparse format": (
        text(output='quantize = "int4"\nformat = "2:4"\n'),
        'goes with format "dense"',
    ),
    "recovery": (text('recover = "lowrank"\n'), 'does not go with prune.recover = "lowrank"'),
    "an unknown scheme": (text(output='quantize = "int3"\n'), "int3"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case, mistakes):
    given, message = CASES[case]
    assert message in "\n".join(mistakes(given))


def test_goes_with_pruning(load):
    assert load(text()).output.quantize == "int4"
