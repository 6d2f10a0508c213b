"""The command ``prunekit quantize``: its config, and what it refuses."""

from pathlib import Path

from prunekit.cli.main import main
from prunekit.cli.quantize import config_text
from prunekit.config.load import load_config_text


def test_the_config_prunes_nothing(tmp_path):
    name = 'a "b" ü'
    (tmp_path / name).mkdir()
    calibration = {"data": ["pydoc:train"], "samples": 3, "length": 9}
    text = config_text(str(tmp_path / name), Path("out"), "int4", calibration, "cpu")
    config = load_config_text(text, tmp_path, "here")
    assert config.prune.sparsity == 0
    assert config.output.quantize == "int4"
    assert config.calibration.samples == 3
    assert config.model.path == str(tmp_path / name)
    bare = config_text("a/b", Path("out"), "fp8", None, "cpu")
    assert load_config_text(bare, tmp_path, "here").calibration is None


def test_a_missing_scheme_or_model_is_an_input_error(tmp_path, capsys):
    assert main(["quantize", "m", str(tmp_path / "o")]) == 2
    assert "--scheme" in capsys.readouterr().err
    source = str(tmp_path / "absent" / "m")
    assert main(["quantize", source, str(tmp_path / "o"), "--scheme", "int4"]) == 2
    assert "absent" in capsys.readouterr().err
