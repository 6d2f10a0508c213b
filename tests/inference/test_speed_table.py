"""The table of the fastest kernels and its description in reports."""

import json

import pytest

from prunekit.inference import speed_table
from prunekit.inference.speed_table import KernelChoice


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_tuning_table_goes_round():
    layer = speed_table.layer_key("2:4", "bfloat16", 4096, 4096)
    assert speed_table.look_up("H200", layer) is None
    speed_table.save("H200", {layer: KernelChoice(max_kernel_tokens=64, semi_structured=True)})
    speed_table.save("H200", {"other": KernelChoice(max_kernel_tokens=1)})
    assert speed_table.look_up("H200", layer) == KernelChoice(
        max_kernel_tokens=64, semi_structured=True
    )
    speed_table.table_file().write_text("{")
    speed_table._table.cache_clear()
    assert speed_table.look_up("H200", layer) is None


def test_a_report_says_how_layers_multiply_and_where_dense_is_faster():
    layers = {"2:4 bfloat16 8x8", "2:4 bfloat16 16x8"}
    assert speed_table.describe("H200", layers).startswith(
        "Nothing was measured on H200: prunekit bench"
    )
    speed_table.save(
        "H200", {"2:4 bfloat16 8x8": KernelChoice(64, semi_structured=True, max_faster_tokens=4096)}
    )
    assert speed_table.describe("H200", layers) == (
        "Of 2 layer shapes 1 were measured on H200: our kernel takes up to 64 tokens, with more "
        "the product is torch's semi-structured one; faster than dense up to 4096 tokens."
    )
    speed_table.save("H200", {"2:4 bfloat16 16x8": KernelChoice(0)})
    assert speed_table.describe("H200", layers).endswith(
        "up to 64 (only 0 in some) tokens, with more the product is torch's semi-structured one in "
        "1 and dense, expanded for the moment, elsewhere; faster than dense up to 4096 (only 0 in "
        "some) tokens, 1 of them never: there --format dense is faster."
    )
    assert "memory is saved, time is not" in speed_table.describe("CPU", layers)


def test_tables_of_earlier_versions_are_read():
    file = speed_table.table_file()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"H200": {"a": {"reach": 64, "semi": True, "pays": 16}}}))
    assert speed_table.look_up("H200", "a") == KernelChoice(
        64, semi_structured=True, max_faster_tokens=16
    )
    speed_table.save("H200", {"b": KernelChoice(1)})
    assert json.loads(file.read_text())["H200"] == {
        "a": {"reach": 64, "semi": True, "pays": 16},
        "b": {"reach": 1, "semi": False, "pays": 0},
    }
