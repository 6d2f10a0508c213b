"""Identity of a job: everything that decides the result, and nothing else."""

import shutil
from dataclasses import replace

import pytest
import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ConfigError
from prunekit.runs import identity
from prunekit.runs.identity import WeightDigests, check_weights
from prunekit.runs.sparsify.run import SparsifyRun
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


def fingerprint(plan):
    return identity.fingerprint(plan, *SparsifyRun(plan)._texts())


def test_the_fingerprint_follows_everything_that_changes_the_result(folder, tmp_path):
    plan = planned(folder, tmp_path / "out")
    same = planned(folder, tmp_path / "elsewhere", calibration={"hidden": "disk"})
    assert fingerprint(plan) == fingerprint(same)
    text = {"data": str(folder / "text.txt"), "length": 12, "windows": 2}
    others = [
        planned(folder, tmp_path / "out", prune={"pattern": "4:8"}),
        planned(folder, tmp_path / "out", calibration={"seed": 1}),
        planned(folder, tmp_path / "out", evaluate=text),
        *(planned(folder, tmp_path / "out", output={"quantize": each}) for each in ("int8", "fp8")),
        replace(plan, dtype=torch.bfloat16),
    ]
    assert len({fingerprint(each) for each in [plan, *others]}) == 7


def test_the_fingerprint_follows_the_content_of_files(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = {"data": str(tmp_path / "judged.txt"), "length": 12, "windows": 2}

    def now():
        return fingerprint(planned(copy, tmp_path / "out", evaluate=text))

    (tmp_path / "judged.txt").write_text(checkpoints.TEXT)
    seen = [now()]
    (tmp_path / "judged.txt").write_text(checkpoints.TEXT.replace("fox", "ox "))
    seen.append(now())
    (copy / "text.txt").write_text(checkpoints.TEXT.replace("o", "0"))
    seen.append(now())
    checkpoints.configure(copy, rms_norm_eps=1e-3)
    seen.append(now())
    checkpoints.change(copy, "model.norm.weight", lambda weight: weight.half())
    seen.append(now())
    assert len(set(seen)) == 5
    (copy / "model.safetensors").touch()
    assert now() == seen[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_tensor_is_digested_once_as_it_is_stored(tmp_path, dtype):
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    held = {"scalar": torch.ones((), dtype=dtype), "none": torch.ones(0, 3, dtype=dtype)}
    checkpoints.save(folder, checkpoints.tensors(folder) | held)
    digests, checkpoint = WeightDigests(), open_checkpoint(folder)
    list(replace(checkpoint, on_read=digests.record).read(checkpoint.entries))
    found = digests.take()
    assert found["weights"].keys() == checkpoint.entries.keys()
    check_weights(checkpoint, [{}, found, {"weights": {}}])
    list(replace(checkpoint, on_read=digests.record).read(checkpoint.entries))
    assert digests.take() == {}


def test_a_changed_tensor_is_named(folder, tmp_path):
    copy, digests = shutil.copytree(folder, tmp_path / "copy"), WeightDigests()
    checkpoint = open_checkpoint(copy)
    list(replace(checkpoint, on_read=digests.record).read(["model.norm.weight"]))
    found = digests.take()
    checkpoints.change(copy, "lm_head.weight", lambda weight: weight.mul_(2))
    check_weights(checkpoint, [found])
    checkpoints.change(copy, "model.norm.weight", lambda weight: weight.mul_(2))
    with pytest.raises(ConfigError, match=r"model.safetensors: model.norm.weight was changed"):
        check_weights(checkpoint, [found])
