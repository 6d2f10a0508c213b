"""Quantized layers: zeros, errors, scales."""

import pytest
import torch
from prunekit_kernels import nearest, spread

from prunekit.methods.layer import Pruned
from prunekit.methods.quantize import Quantization, quantize
from prunekit.methods.sparsegpt import SparseGPT
from tests.support.methods import INPUTS, error, layer, tokens, weights

GROUP = 12


def how(scheme="int4", *, compensates=True):
    return Quantization(scheme, GROUP if scheme == "int4" else None, compensates)


def as_pruned(given, found):
    return error(given, Pruned(found.weight, found.weight != 0))


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_and_compensation_errs_less(scheme, pattern):
    given = layer(pattern, x=tokens(600))
    pruned = SparseGPT().prune(given).weight
    before = pruned.clone()
    ours = quantize(given, pruned, how(scheme), torch.bfloat16)
    plain = quantize(given, pruned, how(scheme, compensates=False), torch.bfloat16)
    assert torch.equal(pruned, before)
    for found in (ours, plain):
        assert not found.weight[pruned == 0].any()
        assert torch.equal(found.scale, found.scale.bfloat16().float())
        wide = spread(found.scale, INPUTS)
        assert torch.equal(nearest(found.weight, wide, scheme), found.weight)
    assert as_pruned(given, ours) < as_pruned(given, plain)


def test_four_bits_towards_the_dense_outputs_err_less_than_sparsegpt_in_floats():
    given = layer("2:4", x=tokens(600))
    pruned = SparseGPT().prune(given)
    found = quantize(given, pruned.weight, how("int8"), torch.float32)
    assert as_pruned(given, found) < error(given, pruned)


def test_a_layer_without_tokens_is_rounded_to_nearest():
    given = layer("2:4")
    pruned = SparseGPT().prune(given).weight
    found = quantize(given, pruned, how(), torch.float32, compensate=False)
    plain = quantize(given, pruned, how(compensates=False), torch.float32)
    assert torch.equal(found.weight, plain.weight)


def test_rows_do_not_mix():
    given = layer("2:4", x=tokens(600))
    pruned = SparseGPT().prune(given).weight
    whole = quantize(given, pruned, how(), torch.bfloat16)
    first = layer("2:4", x=tokens(600), weight=weights()[:5])
    part = quantize(first, pruned[:5], how(), torch.bfloat16)
    assert torch.equal(part.scale, whole.scale[:5])
    torch.testing.assert_close(part.weight, whole.weight[:5])
