"""Values that a sweep measures for one model."""

import pytest

from prunekit.config.run_config import Config
from prunekit.runs.sweep.measure import measure


@pytest.fixture
def config(llama, tmp_path):
    text = {"data": str(llama / "text.txt"), "length": 12, "windows": 2}
    return Config.model_validate(
        {
            "model": {"path": str(llama), "device": "cpu"},
            "calibration": {"data": text["data"], "samples": 4, "length": 12},
            "prune": {"method": "wanda", "pattern": "2:4"},
            "evaluate": text,
            "output": {"path": str(tmp_path / "out")},
        }
    )


def test_a_model_is_evaluated_and_its_files_are_counted(llama, config):
    (facts,) = measure(str(llama), config, 0)
    (evaluation,) = facts["evaluation"]
    assert float(evaluation["value"]) > 1
    assert facts["bytes"] == sum(file.stat().st_size for file in llama.glob("*.safetensors"))
    assert facts["peak_rss_bytes"] > 0
    assert not {"decode", "texts"} & facts.keys()


def test_speed_and_quality_of_text_are_medians_over_prompts(llama, config):
    (facts,) = measure(str(llama), config, 2)
    assert facts["decode"] > 0
    assert facts["prefill"] > 0
    assert 0 <= facts["lexical_diversity"] <= 1
    assert 0 <= facts["repetition"] <= 1
    assert all(len(pair) == 2 for pair in facts["texts"])
