"""Free memory, threads, and device maps of large models."""

import pytest
import torch
from torch.testing import assert_close

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.evaluation.generation import generate
from prunekit.evaluation.proof import make_proof
from prunekit.models import cgroups, memory, stock
from prunekit.models.load import open_whole
from tests.support import checkpoints

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path):
    return checkpoints.write(tmp_path, num_hidden_layers=3)


def test_ranks_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(cgroups, "free_memory", lambda: iter([1000, 750]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_host_bytes() == 375


@pytest.mark.parametrize(
    ("usable", "ranks", "variable", "threads"),
    [(3, 1, None, 3), (3, 2, None, 1), (1, 4, None, 1), (99, 1, None, 8), (3, 1, "8", 8)],
)
def test_threads_are_at_most_the_processors(monkeypatch, usable, ranks, variable, threads):
    used = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(cgroups, "usable_cpus", lambda: usable)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    memory.limit_threads()
    assert used[-1] == threads
    memory.limit_threads(5)
    assert used[-1] == 5


def test_device_maps_are_only_used_for_models_larger_than_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1150)
    assert memory.device_map_options(1000, CPU, "folder") == {}
    assert memory.device_map_options(1001, CPU, "folder") == {
        "device_map": "auto",
        "max_memory": {"cpu": 1000},
        "offload_folder": "folder",
    }


def test_a_model_larger_than_memory_generates_and_answers_from_files(llama, monkeypatch):
    checkpoint, prompt = open_checkpoint(llama), ["Once"]
    expected = generate(str(llama), 2, prompt)
    proof = make_proof(checkpoint, CPU)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: checkpoint.nbytes // 2)
    with open_whole(checkpoint, torch.float32, CPU) as model:
        assert {"cpu", "disk"} == {*model.hf_device_map.values()}
    assert generate(str(llama), 2, prompt)[0].text == expected[0].text
    places = memory.device_map_options(checkpoint.nbytes, CPU, str(llama / "offload"))
    answers = stock.answers(llama, {key: proof[key] for key in ("ids", "dtype", "device")}, places)
    assert_close(answers, torch.tensor(proof["answers"]))
