"""What ``prunekit bench`` concludes from what it measured, and that it measures."""

import json

import pytest
import torch
import transformers

import prunekit
from prunekit.cli.main import main
from prunekit.inference import speed_table
from prunekit.inference.layer_speed import (
    Measured,
    Row,
    best_speeds,
    choices,
    contestants,
    verdicts,
)
from prunekit.inference.model_speed import _Fixed, _Growing
from prunekit.inference.speed_table import Choice
from tests.support import checkpoints
from tests.support.checkpoints import planned


def rows(speeds, outputs=8, inputs=8):
    """Rows of one layer: ``speeds[M][way]`` over dense."""
    return [
        Row(outputs, inputs, tokens, way, 1 / speed, speed, 0.5, 0.1)
        for tokens, ways in speeds.items()
        for way, speed in {"dense": 1.0, **ways}.items()
    ]


def ways(*speeds):
    names = ("2:4", "2:4 expanded", "cuSPARSELt", "bitmask", "bitmask expanded")
    return dict(zip(names, speeds, strict=True))


MEASURED = {
    1: ways(1.7, 0.4, 0.9, 1.2, 0.3),
    64: ways(1.1, 0.8, 1.0, 0.5, 0.7),
    4096: ways(0.4, 0.9, 1.4, 0.1, 0.9),
}


def measured(rows):
    return Measured("H200", "bfloat16", 4e12, 8e14, rows)


def test_verdicts_say_for_how_many_tokens_it_pays():
    two_four, bitmask = verdicts(measured(rows(MEASURED)))
    assert two_four == (
        "2:4 pays on H200 for every M measured (geometric mean over layers, dense is 1: 1.7x at "
        "M = 1, 1.1x at M = 64, 1.4x at M = 4096)."
    )
    assert bitmask.startswith("bitmask pays on H200 for M = 1 (")
    slow = {1: {"2:4": 0.5}}
    assert "does not pay on H200, it only saves memory" in verdicts(measured(rows(slow)))[0]


def test_layers_are_averaged_geometrically():
    both = rows({1: {"2:4": 2.0}}) + rows({1: {"2:4": 0.5}}, outputs=16)
    assert best_speeds(both, "2:4") == {1: pytest.approx(1.0)}


def test_choices_are_where_the_fastest_way_changes():
    found = choices(measured(rows(MEASURED)))
    assert found == {
        "2:4 bfloat16 8x8": Choice(max_kernel_tokens=64, semi=True, max_faster_tokens=4096),
        "bitmask bfloat16 8x8": Choice(max_kernel_tokens=1, semi=False, max_faster_tokens=1),
    }
    never = {1: {"2:4": 0.5, "2:4 expanded": 0.8, "bitmask": 0.5, "bitmask expanded": 0.6}}
    assert choices(measured(rows(never)))["2:4 bfloat16 8x8"] == Choice(
        max_kernel_tokens=0, semi=False
    )


def test_a_report_says_how_layers_multiply_and_where_dense_is_faster(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layers = {"2:4 bfloat16 8x8", "2:4 bfloat16 16x8"}
    assert speed_table.describe("H200", layers).startswith(
        "Nothing was measured on H200: prunekit bench"
    )
    speed_table.save("H200", {"2:4 bfloat16 8x8": Choice(64, semi=True, max_faster_tokens=4096)})
    assert speed_table.describe("H200", layers) == (
        "Of 2 layer shapes 1 were measured on H200: our kernel takes up to 64 tokens, with more "
        "the product is torch's semi-structured one; faster than dense up to 4096 tokens."
    )
    speed_table.save("H200", {"2:4 bfloat16 16x8": Choice(0)})
    assert speed_table.describe("H200", layers).endswith(
        "up to 64 (only 0 in some) tokens, with more the product is torch's semi-structured one in "
        "1 and dense, expanded for the moment, elsewhere; faster than dense up to 4096 (only 0 in "
        "some) tokens, 1 of them never: there --format dense is faster."
    )
    assert "memory is saved, time is not" in speed_table.describe("CPU", layers)


def test_one_step_of_a_fixed_cache_writes_what_a_growing_one_writes():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = (torch.arange(6) * 7919 % 97)[None]

    def called_before(step):
        step()
        return step

    with torch.inference_mode():
        writers = [_Growing(model, ids, 9), _Fixed(model, ids, 9, called_before)]
        for writer in writers:
            for _ in range(2):  # the second time nothing of the first is left
                writer.read()
                writer.write()
    growing, fixed = (torch.cat(writer.tokens).flatten().tolist() for writer in writers)
    assert growing == fixed
    assert len(set(growing)) > 1


def test_contestants_do_the_same_work():
    ways = contestants(24, 40, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 40)
    (dense, *_), size = ways["dense"]
    assert size == 24 * 40 * 4
    for calls, _ in ways.values():
        for call in calls:
            torch.testing.assert_close(call(x), dense(x))


def test_the_command_measures_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    monkeypatch.setattr("prunekit.inference.layer_speed.SECONDS", 0.0)
    monkeypatch.setattr("prunekit.inference.benchmark.NEW", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    list(prunekit.run(planned(tmp_path / "m", tmp_path / "out", output={"format": "2:4"})))
    command = ["bench", "--model", str(tmp_path / "out"), "--output", str(tmp_path / "speed")]
    assert main([*command, "--tokens", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("2:4 ")
    assert said[-1].startswith("bitmask ")
    found = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert {(row["outputs"], row["inputs"]) for row in found["rows"]} == {
        (16, 32), (32, 32), (32, 64), (64, 32)
    }  # fmt: skip
    dense, sparse = found["models"]
    assert (dense["layers"], sparse["layers"], sparse["count"]) == ("dense", "2:4", 14)
    assert sparse["resident_bytes"] < dense["resident_bytes"]
    assert (tmp_path / "speed" / "speed.svg").read_text().count("2:4") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--dtype", "int8"], '--dtype "int8" is not one'), (["--tokens", "0"], "at least 1")],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path, capsys):
    assert main(["bench", "--output", str(tmp_path / "speed"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_dense_model_is_refused(tmp_path, capsys):
    checkpoints.write(tmp_path / "m")
    assert main(["bench", "--model", str(tmp_path / "m")]) == 2
    assert "none of its layers has enough zeros" in capsys.readouterr().err
