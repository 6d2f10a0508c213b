"""Planning before any weight is read: decisions and error cases."""

import json
import shutil
from io import StringIO
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from prunekit.config.run_config import Config
from prunekit.distributed.ranks import Ranks
from prunekit.errors import CapacityError, CheckpointError, ConfigError
from prunekit.runs.preflight import Preflight
from prunekit.runs.sparsify import planner
from prunekit.runs.sparsify.plan import Plan
from tests.support import checkpoints
from tests.support.architectures import TINY
from tests.support.checkpoints import NOT_COPIED, planned


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def shown(plan):
    console = Console(width=200, record=True, file=StringIO())
    console.print(plan.describe())
    return console.export_text()


@pytest.mark.parametrize("model_type", TINY)
def test_every_declared_type_is_planned_without_reading_a_weight(
    tmp_path, output, model_type, monkeypatch
):
    folder = checkpoints.write(tmp_path / "model", model_type)
    monkeypatch.setattr("prunekit.checkpoint.reader.safe_open", None)
    plan = planned(folder, output, prune={"method": "sparsegpt"})
    assert not plan.architecture.probed
    dense = [note for note in plan.notes if note != NOT_COPIED]
    assert all("relative_attention_bias" in note for note in dense)  # of T5, named and left
    assert len(plan.sizes) == len(plan.linears)
    assert all(parameter.is_meta for parameter in plan.model.parameters())
    assert plan.memory.total > 0
    assert not output.exists()
    text = shown(plan)
    assert f"{len(plan.sizes)} of {len(plan.sizes)} linears are pruned" in text
    assert "sparsegpt, 2:4, sparsity 0.5" in text


def test_a_folder_without_a_tokenizer_is_refused(llama, output, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=f"^{folder}: has no tokenizer that can be loaded"):
        planned(folder, output)


def test_too_little_memory_is_refused(llama, output, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(CapacityError, match=r"^memory: the run needs about .* measure_error = f"):
        planned(llama, output)
    with pytest.raises(CapacityError, match=r"calibration.length\.$"):
        planned(llama, output, prune={"measure_error": False})


def test_no_kept_weight_is_rounded_to_a_narrower_type(tmp_path, output, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    assert planned(folder, output).dtype == torch.bfloat16
    name = "model.layers.0.mlp.down_proj"
    checkpoints.change(folder, f"{name}.weight", lambda weight: weight.float())
    assert planned(folder, output).dtype == torch.float32
    assert planned(folder, output, prune={"skip": ["*.0.mlp.down_proj"]}).dtype == torch.bfloat16
    assert planned(folder, output, model={"dtype": "bfloat16"}).dtype == torch.bfloat16


def test_the_plan_counts_what_runs_in_another_type_than_blocks(tmp_path, output, monkeypatch):
    """The loss uses float32; the dense model generates in its stored dtype."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    own = {"data": "self"}
    plans = [
        planned(checkpoints.write(tmp_path / str(kind), dtype=kind), output, model={"dtype": asked},
                calibration=own)
        for kind, asked in ((torch.bfloat16, "bfloat16"), (torch.float32, "bfloat16"),
                            (torch.bfloat16, "float32"))
    ]  # fmt: skip
    assert [plan.dtype.itemsize for plan in plans] == [2, 2, 4]
    head = plans[0].model.lm_head.weight.numel()
    assert [plan.memory.vocabulary for plan in plans] == [6 * head, 6 * head, 8 * head]
    narrow, wide, last = (plan.memory.writer for plan in plans)
    assert (wide, last) == (2 * narrow, narrow)


def test_what_is_gathered_follows_from_the_method(llama, output):
    def gathers(**prune):
        return [kind.name for kind in planned(llama, output, prune=prune).recipe.needs]

    assert gathers() == ["column_energy", "sampled_gram"]
    assert gathers(method="magnitude") == ["column_energy", "sampled_gram"]
    assert gathers(method="sparsegpt") == ["gram"]
    assert gathers(measure_error=False) == ["column_energy"]
    assert gathers(method="magnitude", measure_error=False) == []
    assert gathers(method="sparsegpt", measure_error=False) == ["gram"]


def test_a_checkpoint_of_another_model_is_refused(llama, output, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    held = checkpoints.tensors(folder)
    save_file({"model.norm.weight": held["model.norm.weight"]}, checkpoints.single(folder))
    with pytest.raises(CheckpointError, match=f"^{folder}: has no model.* lacks .* more tensors"):
        planned(folder, output)


def test_planning_twice_gives_the_same(llama, output):
    first, second = planned(llama, output), planned(llama, output)
    assert first.blocks == second.blocks
    assert (first.memory, first.notes) == (second.memory, second.notes)
    assert isinstance(first, Plan)


LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "float16",
}


@pytest.fixture
def outlined(tmp_path):
    """A run config for a model that has only a ``config.json``."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(LLAMA_2_70B))
    (tmp_path / "text.txt").write_text("some text")
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 128, "length": 2048}
    return Config.model_validate(
        {
            "model": {"path": str(tmp_path / "m")},
            "calibration": calibration,
            "prune": {"method": "sparsegpt", "pattern": "2:4"},
            "output": {"path": str(tmp_path / "out")},
        }
    )


def test_a_large_model_is_planned_for_other_machines_from_its_config_alone(outlined):
    plans = {size: planner.plan(outlined, Ranks(0, size), Preflight(80 * 10**9)) for size in (1, 8)}
    for made in plans.values():
        assert made.parameters == 68_976_648_192
        assert made.dtype is torch.float16
        assert made.device.type == "cuda"
    alone, shared = plans[1].memory, plans[8].memory
    assert alone.hidden == 128 * 2048 * 8192 * 2 == 8 * shared.hidden
    assert shared.block == alone.block
    assert shared.solve < alone.solve
    # A block as read, two on their way to disk and the next one in pinned memory, where a weight
    # takes a power of two.
    weights = 2 * 8192**2 + 2 * 1024 * 8192, 3 * 28672 * 8192
    pinned = 2 * weights[0] + 3 * 2**29
    assert weights[0] + weights[1] < 855_654_400
    assert shared.waiting == pinned
    assert shared.host == 2 * 855_654_400 * 2 + 2 * pinned
    assert "8: samples and rows are shared" in shown(plans[8])
    with pytest.raises(CapacityError, match=r"needs about .* on cuda, .* are free"):
        planner.plan(outlined, Ranks(0, 8), Preflight(8 * 10**9))
    with pytest.raises(ConfigError, match="cannot be shared by 129"):
        planner.plan(outlined, Ranks(0, 129), Preflight(80 * 10**9))


@pytest.mark.parametrize(("method", "size"), [("sparsegpt", 2), ("admm", 4), ("alps", 8)])
def test_ranks_share_the_operations_alike(outlined, size, method):
    config = outlined.model_dump(exclude_defaults=True, mode="json")
    config["prune"] = {"method": method, "pattern": "2:4"}
    alone, shared = (
        planner.plan(Config.model_validate(config), Ranks(0, count), Preflight(80 * 10**9)).work
        for count in (1, size)
    )
    assert sum(shared.solve) == alone.solve[0]
    for rank in shared.solve:
        assert rank == pytest.approx(alone.solve[0] / size, rel=0.05)
    assert shared.forward * size == alone.forward


def test_a_run_needs_the_weights(outlined):
    with pytest.raises(CheckpointError, match="holds neither"):
        planner.plan(outlined)
