"""Settings of a plug-in are written flat in its table."""

from prunekit.config.plugin_table import nest_method_settings
from prunekit.config.prune_table import Prune
from prunekit.methods import methods


def test_no_method_has_a_setting_called_like_a_key_of_prune():
    for kind in methods().values():
        assert not kind.model_fields.keys() & Prune.model_fields.keys()


def test_settings_are_nested_under_the_method():
    values = {"method": "sparsegpt", "damping": 0.1, "pattern": "2:4"}
    assert nest_method_settings(values, {"method", "pattern"}, methods()) == {
        "method": {"name": "sparsegpt", "damping": 0.1},
        "pattern": "2:4",
    }


def test_without_a_known_method_only_unknown_keys_are_left_to_report():
    values = {"method": "sparse", "damping": 0.1, "patern": "2:4"}
    found = nest_method_settings(values, {"method", "pattern"}, methods())
    assert found == {"method": "sparse", "patern": "2:4"}


def test_what_is_no_table_is_left_to_pydantic():
    assert nest_method_settings("wanda", {"method"}, methods()) == "wanda"
