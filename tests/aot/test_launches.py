"""How many launches an operation takes, and that the host waits for none of them.

Operations run on meta tensors; Triton's kernels are counted instead of compiled. A meta tensor has
no numbers, so an operation that asked for some would fail, as one would that waits on a GPU.
"""

import importlib
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

pytest.importorskip("triton")

from prunekit_kernels import Groups, NOfM, Sweep, _select_radix, _source  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests.aot.compile_only import compile_only  # noqa: E402
from tests.aot.launch import BF16, meta  # noqa: E402
from tests.aot.launches import launches  # noqa: E402

ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias"}
"""Operations that launch nothing, besides views."""
FROM_HOST = {"lift_fresh", "_pin_memory"}
"""Operations that copy from main memory, as a copy to another device may."""

HELD = {
    "score_and_mask: bf16 I=4096 row": 1,
    "score_and_mask: bf16 I=4096 2:4": 1,
    "score_and_mask: bf16 I=4000 5:10": 1,
    "score_and_mask: bf16 I=4096 layer": 4,
    "score_and_mask: bf16 I=4096 layer magnitude": 3,
    "score_and_mask: bf16 I=4096 windows": 4,
    "score_and_mask: bf16 I=4096 block 4x4": 9,
    "score_and_mask: bf16 I=4000 rows": 10,
    "score_and_mask: bf16 I=40960 row": 5,
    "selection: f32 I=4096 layer": 4,
    "project: f32 I=4096 row": 1,
    "project: f32 I=4096 layer": 4,
    "packed_mask: bf16 apply": 1,
    "sparse24_mma: bf16 I=14336 M=1": 1,
    "sparse24_mma: bf16 I=14336 M=16": 1,
    "sparse24_mma: bf16 I=14336 M=100": 2,
    "bitmask_matvec: bf16 I=14336 M=1": 1,
    "column_energy: bf16 I=14336": 2,
    "gram: bf16 I=14336": 1,
    "salience: bf16 I=14336": 2,
    "salience: bf16 I=14336 sums": 2,
    "probability_entropy: bf16 T=1024": 3,
    "obs_block: f32 O=4096 2:4": 2,
    "obs_block: f32 O=4096 given": 2,
    "sparse24: bf16 I=14336": 1,
    "bitmask: bf16 I=14336": 1,
    "sparse24_matmul: bf16 I=14336 M=1": 4,
    "sparse24_matmul: bf16 I=14336 M=32": 1,
    "bitmask_matvec: bf16 I=14336 M=16": 1,
    "attention_entropy: bf16 D=128 causal": 3,
}
"""Launches of each, at most; fills of counters that are kept count once, before."""


class Counted(TorchDispatchMode):
    """Counts operations of PyTorch that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names, self.from_host = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        views = any(each.alias_info and not each.alias_info.is_write
                    for each in function._schema.arguments)  # fmt: skip
        elsewhere = (kwargs or {}).get("device") not in (None, torch.device("meta"))
        if name in FROM_HOST or (name == "_to_copy" and elsewhere):
            self.from_host.append(name)
        if name not in ALLOCATE and not views:
            self.names.append(name)
        return function(*args, **kwargs or {})


@pytest.fixture
def count(monkeypatch):
    """Yield a function that returns the launches of another one."""
    kernels = []

    def counted(run):
        run()  # fills what is kept
        kernels.clear()
        with Counted() as ran:
            run()
        assert not ran.from_host
        return [*kernels, *ran.names]

    with compile_only("sm_90", monkeypatch):
        monkeypatch.setattr(
            JITFunction, "run", lambda self, *_, **__: kernels.append(self.__name__)
        )
        yield counted


def test_every_op_is_held():
    assert {launch.op for launch in launches()} == {name.split(":")[0] for name in HELD}


@pytest.mark.parametrize("name", HELD)
def test_launches_are_few(name, count):
    (launch,) = (launch for launch in launches() if str(launch) == name)
    assert len(count(launch.run)) <= HELD[name], count(launch.run)


def test_counters_are_filled_once(count):
    _counters = importlib.import_module("prunekit_kernels._counters")
    _counters._zeros.clear()
    source = _source.scores(meta(64, 512))
    kernels = count(lambda: _select_radix.choose(source, Groups(None, None, (99,))))
    assert kernels == ["count_kernel", "count_kernel", "count_kernel", "write_kernel"]
    assert len(_counters._zeros) == 1


def test_counters_of_a_failed_selection_are_not_kept(monkeypatch):
    _counters = importlib.import_module("prunekit_kernels._counters")
    _counters._zeros.clear()

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(JITFunction, "run", fail)
    with pytest.raises(RuntimeError):
        _select_radix.choose(_source.scores(meta(64, 512)), Groups(None, None, (99,)))
    assert not _counters._zeros


def test_uneven_counts_of_windows_are_kept_on_the_device(count):
    source = _source.weights(meta(64, 512, dtype=BF16), meta(512), None, None)
    groups = Groups(None, 128, (4000, 4001, 4000, 4001))
    bits = meta(64, 64, dtype=torch.uint8)
    assert len(count(lambda: _select_radix.launch(source, groups, bits))) == 4


def test_a_leaf_of_an_unstructured_sweep(count, monkeypatch):
    obs_sweep, obs_block = (
        importlib.import_module(f"prunekit_kernels.{name}") for name in ("obs_sweep", "obs_block")
    )
    monkeypatch.setattr(
        obs_sweep, "obs_block", lambda sweep, *span: obs_block._launch(sweep, *span, 0, 1, 16)
    )
    work = meta(4096, 4096)
    sweep = Sweep(work, work, meta(4096, 4096, dtype=torch.bool), work)

    def half(score, start):
        groups = Groups(None, None, (score.numel() // 2,))
        return _select_radix.choose(_source.scores(score), groups)

    _, leaf = obs_sweep._step(sweep, half, None)
    assert len(count(lambda: leaf(0, 128))) <= 12
    whole, leaf = obs_sweep._step(sweep, NOfM(2, 4), None)
    monkeypatch.setattr(
        obs_sweep, "obs_block", lambda sweep, *span: obs_block._launch(sweep, *span[:2], 2, 4, 16)
    )
    assert whole == 128
    assert len(count(lambda: leaf(0, 128))) <= 2
