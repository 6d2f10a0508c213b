"""Free memory under control groups, and device maps of large models."""

import pytest
import torch
from torch.testing import assert_close

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.evaluation.generation import generate
from prunekit.evaluation.proof import make_proof
from prunekit.models import memory, stock
from prunekit.models.load import open_whole
from tests.support import checkpoints

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path):
    return checkpoints.write(tmp_path, num_hidden_layers=3)


ONE = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "300"}
TWO = {"memory.max": "1000", "memory.current": "300"}
GROUPS = {
    "version 1": (
        "4:cpu,memory:/job",
        "memory/job",
        ONE,
        "inactive_file 1\ntotal_inactive_file 50",
    ),
    "version 2": ("0::/job", "job", TWO, "active_file 20\ninactive_file 30\nanon 7"),
    "of the job a step is of": ("0::/job/step", "job", TWO, "active_file 50"),
    "of a container": ("0::/named/outside", "", TWO, "active_file 50"),
    "none": ("0::/job", "job", TWO | {"memory.max": "max"}, "active_file 50"),
    "not of memory": ("3:cpu:/job", "cpu/job", TWO, "active_file 50"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_control_group_limits_the_free_memory(name, tmp_path, monkeypatch):
    line, path, files, stat = GROUPS[name]
    for place, content in {
        "proc/self/cgroup": f"9:name=systemd:/\n{line}\n",
        **{f"sys/fs/cgroup/{path}/{file}": content for file, content in files.items()},
        f"sys/fs/cgroup/{path}/memory.stat": f"{stat}\n",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(content)
    monkeypatch.setattr(memory, "FILE_SYSTEM_ROOT", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    limited = memory.free_host_bytes() == (1000 - 300 + 50) // 2
    assert limited == (name not in ("none", "not of memory"))


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
