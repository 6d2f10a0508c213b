"""Plans of every kind as JSON."""

import json

import pytest

from prunekit.cli.main import main
from tests.support import checkpoints
from tests.support.structured import BASE, BOTH, EVALUATE
from tests.support.sweeps import write_sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("prune", "kind"),
    [
        ('method = "wanda"\npattern = "2:4"', "weights"),
        ('method = "wanda"\npattern = "2:4"\n[train]\nheld_out = 2', "weights, trained"),
        (BOTH, "units"),
    ],
)
def test_a_plan_is_told_in_numbers(folder, tmp_path, capsys, prune, kind):
    path = tmp_path / "config.toml"
    given = {"model": folder, "text": folder, "output": tmp_path / "out"}
    path.write_text((BASE + EVALUATE).format(**given, prune=prune))
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == kind
    size = sum(value.nbytes for value in checkpoints.tensors(folder).values())
    assert found["disk_bytes"]["checkpoint"] == found["disk_bytes"]["joining"] == size
    assert (found["disk_bytes"]["training"] > 0) == ("train" in prune)
    assert all(isinstance(value, int | str) for value in found["memory_bytes"].values())
    if kind == "units":
        assert {*found["units"]} == {"neurons", "heads"}
        assert sum(group["units"] for group in found["units"]["neurons"]) == 2 * 64
    else:
        assert len(found["linears"]) == 14
        assert found["linears"][0] == {
            "name": "model.layers.0.self_attn.q_proj", "outputs": 32, "inputs": 32,
            "dtype": "float32", "skipped": None,
        }  # fmt: skip
    assert found["model"]["parameters"] > found["model"]["prunable_parameters"] > 0


def test_a_sweep_is_told_run_by_run(folder, tmp_path, capsys):
    path = write_sweep(folder, tmp_path / "out", "sparsity = [0.25, 0.5]", 'method = "obs"')
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found["runs"]] == ["0.25", "0.5"]
    assert found["runs"]["0.5"]["config"]["prune"]["sparsity"] == 0.5
