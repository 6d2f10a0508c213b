"""Entries of a config by name, also of its parts."""

from transformers import AutoModelForImageTextToText

from prunekit.architectures import Stack
from prunekit.architectures.block_lists import config_part
from prunekit.models.units.config_entries import entry_name, set_config_entries, with_entries
from tests.support.architectures import tiny


def test_entries_are_set_in_every_config_of_the_model():
    model = tiny("t5")
    set_config_entries(model, {"num_heads": 3})
    assert {module.config.num_heads for module in model.modules() if hasattr(module, "config")} == {
        3
    }


def test_entries_of_a_part_are_set_in_the_configs_of_its_kind_alone():
    model = tiny("llava", AutoModelForImageTextToText)
    vision = model.config.vision_config.intermediate_size
    set_config_entries(model, {"text_config.intermediate_size": 5})
    assert model.config.text_config.intermediate_size == 5
    assert model.model.language_model.config.intermediate_size == 5
    assert model.config.vision_config.intermediate_size == vision
    assert not hasattr(model.config, "intermediate_size")


def test_a_part_is_found_in_a_config_and_in_its_entries():
    config = tiny("llava", AutoModelForImageTextToText).config
    assert config_part(config, "") is config
    assert config_part(config, "text_config") is config.text_config
    entries = config.to_dict()
    assert config_part(entries, "text_config") is entries["text_config"]


def test_entries_have_the_name_that_the_family_gives_them():
    assert entry_name(tiny("gpt2").config, Stack("h", ()), "num_hidden_layers") == "n_layer"
    config = tiny("llava", AutoModelForImageTextToText).config
    stack = Stack("language_model.layers", (), config="text_config")
    assert entry_name(config, stack, "num_hidden_layers") == "text_config.num_hidden_layers"


def test_changed_entries_leave_what_they_are_taken_from_alone():
    before = {"a": 1, "text": {"b": 2, "deep": {"c": 3}}}
    after = with_entries(before, {"a": 5, "text.b": 6, "text.deep.c": 7, "new": 8})
    assert after == {"a": 5, "text": {"b": 6, "deep": {"c": 7}}, "new": 8}
    assert before == {"a": 1, "text": {"b": 2, "deep": {"c": 3}}}
