"""Sparse layers: matrix products, state dicts, devices, memory."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.checkpoint.formats import format_named
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.inference.convert import convert
from prunekit.inference.sparse_linear import SparseLinear
from tests.kernels.sparse import two_of_four
from tests.support.checkpoints import planned
from tests.support.closeness import assert_close
from tests.support.corruptions import CASES, spoiled

KINDS = ["2:4", "bitmask"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(kind, dtype=torch.float32, *, bias=True, outputs=24, inputs=40):
    dense = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    dense.weight.data = two_of_four(outputs, inputs, dtype)
    return dense, SparseLinear.of(dense, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (1, 1, 7), (0,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_as_the_dense_layer(kind, leading, bias, dtype):
    dense, sparse = linear(kind, dtype, bias=bias)
    x = torch.randn(*leading, 40).to(dtype)
    exact = x.double() @ dense.weight.double().T + (dense.bias.double() if bias else 0)
    assert_close(sparse(x), exact, dense(x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    dense, sparse = linear(kind)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 5, 9):
        x = torch.randn(tokens, 40)
        assert_close(compiled(x), (dense.double())(x.double()), dense.float()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_it_learn(kind):
    dense, sparse = linear(kind)
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    (found,) = torch.autograd.grad(sparse(x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_round(kind, tmp_path):
    dense, sparse = linear(kind)
    other = SparseLinear.of(dense, kind)
    for part in other.parts.values():
        part.zero_()
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(4, 40)
    assert torch.equal(other(x), sparse(x))
    save_model(sparse, str(tmp_path / "a.safetensors"))
    assert sorted(load_file(tmp_path / "a.safetensors")) == sorted(sparse.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("kind", "corruption"), CASES, ids=str)
def test_corrupt_parts_are_not_loaded(kind, corruption, assign):
    _, sparse = linear(kind, inputs=36)
    model = nn.Sequential(nn.Identity(), sparse)
    given = model.state_dict()
    before = sparse.dense().clone()
    with pytest.raises(CheckpointError, match=f"^1: .*({corruption.message})"):
        model.load_state_dict(spoiled(given, corruption, "1."), strict=False, assign=assign)
    assert torch.equal(sparse.dense(), before)


def test_without_parts_a_state_dict_is_refused_unless_told_otherwise():
    _, sparse = linear("2:4")
    bias = {"bias": torch.zeros_like(sparse.bias)}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight", "keep"'):
        sparse.load_state_dict(bias)
    assert sparse.load_state_dict(bias, strict=False).missing_keys == ["weight", "keep"]
    with pytest.raises(CheckpointError, match=r"^SparseLinear: its part keep is missing"):
        sparse.load_state_dict({"weight": sparse.parts["weight"], "keep": None})


@pytest.mark.parametrize("kind", KINDS)
def test_moves_casts_and_copies(kind):
    dense, sparse = linear(kind)
    x = torch.randn(4, 40)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert half.dense().dtype == torch.bfloat16
    assert half.parts["keep"].dtype == torch.uint8
    assert torch.equal(half.dense(), dense.weight.bfloat16())
    assert sparse.to("meta")(x.to("meta")).shape == (4, 24)


def test_fragment_order_is_invisible_from_outside(monkeypatch):
    monkeypatch.setattr("prunekit.inference.sparse_linear.runs_mma", lambda weight: True)
    dense, sparse = linear("2:4", torch.bfloat16, outputs=32, inputs=512)
    rows = format_named("2:4").compress(dense.weight.detach())
    assert sparse.fragments
    assert not torch.equal(sparse.parts["weight"], rows["weight"])
    assert all(torch.equal(sparse.state_dict()[part], rows[part]) for part in rows)
    x = torch.randn(3, 512).bfloat16()
    assert_close(sparse(x), dense.double()(x.double()), dense.bfloat16()(x))
    before = sparse.parts["weight"].clone()
    sparse.load_state_dict(sparse.state_dict())
    assert torch.equal(sparse.parts["weight"], before)
    assert torch.equal(sparse.dense(), dense.weight)
    monkeypatch.setattr("prunekit.inference.sparse_linear.runs_mma", lambda weight: False)
    sparse.cpu()
    assert not sparse.fragments
    assert torch.equal(sparse.parts["weight"], rows["weight"])


def test_casting_a_fragment_ordered_weight(monkeypatch):
    monkeypatch.setattr("prunekit.inference.sparse_linear.runs_mma", lambda weight: True)
    dense, sparse = linear("2:4", torch.bfloat16, outputs=32, inputs=512)
    assert sparse.half().fragments
    assert torch.equal(sparse.dense(), dense.weight.half())
    assert not sparse.float().fragments
    assert torch.equal(sparse.dense(), dense.weight.half().float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_does_not_fit_is_refused(kind):
    with pytest.raises(ValueError, match="does not fit this weight"):
        SparseLinear.of(nn.Linear(8, 4), kind)


RESIDENT = """
import sys, prunekit, torch, transformers

model = transformers.AutoModelForCausalLM.from_pretrained(*arguments)
held = {}
for tensor in [*model.parameters(), *model.buffers()]:
    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
inside = [m for m in model.modules() if type(m).__name__ in ("SparseLinear", "Linear")]
inside = [m for m in inside if m is not model.lm_head]
parts = [b for m in inside for b in (m.buffers() if list(m.buffers()) else m.parameters())]
torch.no_grad().__enter__()
model(torch.arange(1, 9)[None])
import gc
gc.collect()
# Only up_proj and gate_proj have this shape, and only where they are dense.
dense = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == (64, 32)]
print(sum(b.nbytes for b in parts), len(dense))
"""


def test_no_dense_copy_stays_in_memory(sparse_folders, stock_server, tmp_path):
    def measured(which):
        world = stock_server.start(tmp_path, 1, RESIDENT, sparse_folders / which)
        world.succeed()
        return [int(number) for number in world.stdout(0).split()]

    dense, whole = measured("dense")
    assert whole >= 4
    two_four, copies = measured("2:4")
    assert two_four == 0.5625 * dense
    assert copies == 0


@torch.no_grad()
def logits(model):
    return model(torch.arange(1, 17)[None]).logits


@pytest.mark.slow
def test_a_trained_model_answers_the_same_in_nine_sixteenths(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    source = shared / "models" / "stories15M"
    text = {"data": "pydoc:train", "samples": 4, "length": 64}
    prune = {"method": "sparsegpt", "pattern": "2:4"}
    sections = {"calibration": text, "prune": prune, "output": {"format": "2:4"}}
    list(prunekit.run(planned(source, tmp_path / "2:4", **sections)))
    for kind in ("dense", "bitmask"):
        convert(tmp_path / "2:4", tmp_path / kind, kind)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    for kind in KINDS:
        sparse = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert_close(logits(sparse), logits(exact), logits(dense))
    checkpoint = open_checkpoint(tmp_path / "2:4")
    before = sum(checkpoint.entries[name].nbytes for name in checkpoint.compressed)
    parts = [part for weight in checkpoint.compressed.values() for part in weight.parts.values()]
    assert len(checkpoint.compressed) == 42
    assert sum(checkpoint.file_entries[part].nbytes for part in parts) == 0.5625 * before
