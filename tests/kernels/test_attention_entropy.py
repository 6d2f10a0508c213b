import math

import pytest
import torch
from prunekit_kernels import attention_entropy, probability_entropy
from prunekit_kernels.attention_entropy import _attention_entropy, attention_entropy_reference

from tests.support.closeness import assert_close

F32, BF16 = torch.float32, torch.bfloat16


def pair(device, *, batch=1, heads=2, keys_heads=1, rows=33, keys=33, size=16, dtype=F32):
    generator = torch.Generator().manual_seed(rows + size)
    q = torch.randn(batch, heads, rows, size, generator=generator)
    k = torch.randn(batch, keys_heads, keys, size, generator=generator)
    return 2 * q.to(device, dtype), k.to(device, dtype)


def check(q, k, **options):
    found = attention_entropy(q, k, **options)
    wide = {
        name: part.double() if torch.is_tensor(part) and part.is_floating_point() else part
        for name, part in options.items()
    }
    if "bias" in options:  # the lowest number of its own type hides
        bias = options["bias"]
        hidden = bias <= torch.finfo(bias.dtype).min
        wide["bias"] = wide["bias"].masked_fill(hidden, -math.inf)
    exact = attention_entropy_reference(q.double(), k.double(), **wide)
    plain = attention_entropy_reference(q, k, **options)
    for ours, theirs, reference in zip(found, exact, plain, strict=True):
        assert_close(ours, theirs, reference.float())
    assert torch.equal(found.rows, exact.rows)
    return found


def test_looking_everywhere_alike_is_the_highest_entropy(device):
    q, k = torch.zeros(1, 1, 4, 16, device=device), torch.randn(1, 1, 8, 16, device=device)
    found = attention_entropy(q, k)
    assert found.entropy.tolist() == pytest.approx([4 * math.log(8)])
    assert found.log_keys.tolist() == pytest.approx([4 * math.log(8)])
    assert found.rows.tolist() == [4]


@pytest.mark.parametrize("rows", [1, 33, 64, 130])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length(causal, rows, device):
    check(*pair(device, rows=rows, keys=rows), causal=causal)


@pytest.mark.parametrize(("rows", "keys"), [(1, 70), (5, 133), (70, 9)])
@pytest.mark.parametrize("window", [None, 12])
def test_queries_are_aligned_with_the_last_keys(window, rows, keys, device):
    q, k = pair(device, rows=rows, keys=keys)
    found = check(q, k, causal=True, window=window)
    assert found.rows.tolist() == [min(rows, keys)] * 2


@pytest.mark.parametrize("window", [1, 7, 40, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_sliding_windows(causal, window, device):
    check(*pair(device, rows=150, keys=150), causal=causal, window=window)


@pytest.mark.parametrize("size", [8, 16, 40, 80, 128, 256])
def test_any_head_dimension(size, device):
    check(*pair(device, size=size))


@pytest.mark.parametrize("dtype", [F32, torch.float16, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [64, 160])
def test_any_float_type(size, dtype, device):
    check(*pair(device, rows=70, keys=70, size=size, dtype=dtype), causal=True)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_heads_share_keys(heads, device):
    check(*pair(device, batch=2, heads=heads[0], keys_heads=heads[1]), causal=True)


def test_scale_and_soft_cap(device):
    q, k = pair(device)
    check(q, k, scale=0.7)
    check(q, k, scale=2.0, soft_cap=5.0, causal=True)


@pytest.mark.parametrize("shape", [(2, 1, 1, 33), (1, 1, 33, 33), (2, 2, 33, 33)], ids=str)
def test_boolean_masks(shape, device):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    check(*pair(device, batch=2), mask=mask, causal=True)


@pytest.mark.parametrize("hidden", [-math.inf, "lowest"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_additive_masks(dtype, hidden, device):
    value = torch.finfo(dtype).min if hidden == "lowest" else hidden
    bias = torch.zeros(1, 1, 33, 33, dtype=dtype).masked_fill(torch.rand(33, 33) < 0.3, value)
    found = check(*pair(device, dtype=dtype), bias=bias.to(device))
    mask = (bias == 0).to(device)
    same = attention_entropy(*pair(device, dtype=dtype), mask=mask)
    assert torch.equal(found.log_keys, same.log_keys)


def test_a_bias_near_the_lowest_number_hides_without_a_nan(device):
    q, k = pair(device)
    far = torch.finfo(BF16).min  # above float32's own lowest, so that it counts as seen
    bias = torch.zeros(1, 1, 33, 33).masked_fill(torch.rand(33, 33) < 0.3, far).to(device)
    assert bias.min() > torch.finfo(F32).min
    found = attention_entropy(q, k, bias=bias)
    hidden = attention_entropy(q, k, mask=bias == 0)
    assert torch.allclose(found.entropy, hidden.entropy, rtol=1e-5)
    alone = attention_entropy(q, k, bias=bias.fill_(far))  # nothing else is seen: all are alike
    assert alone.entropy.isfinite().all()


def test_position_bias_and_padding(device):
    q, k = pair(device, batch=2)
    bias = torch.randn(1, 2, 33, 33, device=device)
    lengths = torch.tensor([20, 33], device=device).view(2, 1, 1, 1)
    mask = torch.arange(33, device=device) < lengths
    valid = mask[:, 0, 0]
    found = check(q, k, bias=bias, mask=mask, valid=valid, scale=1.0)
    assert found.rows.tolist() == [53, 53]


def test_rows_that_see_no_key_do_not_count(device):
    q, k = pair(device)
    mask = torch.zeros(1, 1, 33, 33, dtype=torch.bool, device=device)
    assert not torch.stack(attention_entropy(q, k, mask=mask)).any()
    mask[:, :, 3] = True
    assert attention_entropy(q, k, mask=mask).rows.tolist() == [1, 1]


@pytest.mark.parametrize("factor", [0.0, 1e-4, 30.0])
def test_flat_and_sharp_attention(factor, device):
    q, k = pair(device, rows=70, keys=70)
    check(q * factor, k, causal=True)


def test_any_strides(device):
    q, k = pair(device, batch=2, heads=2, keys_heads=2, rows=40, keys=40)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2] for x in (q, k))
    check(q[:, :, 3:], k[:, :, 5:], causal=True)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)], ids=str)
def test_of_nothing_the_sums_are_zero(shape, device):
    q = torch.zeros(shape, device=device)
    assert not torch.stack(attention_entropy(q, q)).any()


def test_of_no_keys_no_row_counts(device):
    q, k = torch.ones(1, 2, 5, 16, device=device), torch.ones(1, 2, 0, 16, device=device)
    assert not torch.stack(attention_entropy(q, k)).any()


def test_same_bits_each_time(device):
    q, k = pair(device, rows=130, keys=130)
    first, second = (torch.stack(attention_entropy(q, k, causal=True)) for _ in range(2))
    assert torch.equal(first, second)


def test_parts_of_a_batch_add_up(device):
    q, k = pair(device, batch=3)
    parts = sum(torch.stack(attention_entropy(q[b : b + 1], k[b : b + 1])) for b in range(3))
    torch.testing.assert_close(parts, torch.stack(attention_entropy(q, k)), rtol=1e-6, atol=0)


def test_equals_the_entropy_of_its_probabilities(device):
    q, k = pair(device)
    p = (q @ k.mT / 4).softmax(-1)
    ours, theirs = attention_entropy(q, k), probability_entropy(p)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"k": torch.ones(1, 2, 5, 8)}, "they must be"),
        ({"k": torch.ones(1, 3, 5, 16)}, "must divide"),
        ({"k": torch.ones(1, 2, 5, 16).half()}, "one float type"),
        ({"window": 0}, "window and soft_cap must be positive"),
        ({"soft_cap": -1.0}, "window and soft_cap must be positive"),
        ({"mask": torch.ones(1, 1, 5, 5)}, "mask must be bool, broadcast to"),
        ({"mask": torch.ones(1, 1, 4, 5).bool()}, "mask must be bool, broadcast to"),
        ({"bias": torch.ones(1, 1, 5, 5).bool()}, "bias must be of a float type"),
        ({"valid": torch.ones(1, 4).bool()}, r"valid must be bool of shape \(1, 5\)"),
    ],
)
def test_refuses_what_does_not_fit(given, reason):
    given = {"q": torch.ones(1, 2, 5, 16), "k": torch.ones(1, 2, 5, 16)} | given
    with pytest.raises(ValueError, match=reason):
        attention_entropy(**given)


def test_is_a_proper_op(device):
    q, k = pair(device, rows=9, keys=9)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool, device=device)
    torch.library.opcheck(_attention_entropy, (q, k, mask, None, None, 0.25, True, 9, 0.0))


def test_compiles_without_graph_break(device):
    q, k = pair(device)
    compiled = torch.compile(attention_entropy, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k).entropy, attention_entropy(q, k).entropy)


def test_memory_on_the_cpu_grows_with_the_length_alone():
    # Twice the keys are given half the rows at a time.
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result):
                self.size = max(self.size, result.numel())
            return result

    from prunekit_kernels.attention_entropy import CHUNK, _chunks

    q, k = pair("cpu", rows=2048, keys=2048)
    with Largest() as seen:
        _chunks(q, k, None, None, None, 1.0, causal=True, window=0, cap=0.0)
    assert seen.size <= CHUNK < 2048 * 2048


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_real_sizes(size, device):
    q, k = pair(device, heads=8, keys_heads=2, rows=2048, keys=2048, size=size, dtype=BF16)
    check(q, k, causal=True)
