"""The config's record of kept units: merging, replacement, deletion when empty."""

from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.models.units.kept_record import read_record, update_record
from tests.support.architectures import tiny


def test_records_of_other_groups_are_kept_and_an_empty_record_disappears():
    model = tiny("llama")
    assert read_record(model) == {}
    update_record(model, ["a", "b"], {"a": 3, "b": [0, 2]})
    update_record(model, ["a"], {"a": 2})
    assert read_record(model) == {"a": 2, "b": [0, 2]}
    assert hasattr(model.config, "quantization_config")
    update_record(model, ["a"], {})
    assert read_record(model) == {"b": [0, 2]}
    update_record(model, ["b"], {})
    assert not hasattr(model.config, KEPT_UNITS_KEY)
    assert not hasattr(model.config, "quantization_config")
