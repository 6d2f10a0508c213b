"""The model card: what of the source's card holds, and what the run measured."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import prunekit
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.structured_table import prunes_units
from prunekit.reports import model_card
from tests.support import checkpoints

SOURCE = """\
---
license: apache-2.0
license_link: LICENSE
language: [en]
tags: [story, "a: b"]
base_model: someone/ancestor
widget: [{text: hello}]
datasets: [roneneldan/TinyStories]
---
# Secret sauce
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = checkpoints.write(tmp_path_factory.mktemp("card") / "m")
    (folder / "README.md").write_text(SOURCE)
    (folder / "LICENSE").write_text("Apache")
    return folder


def planned(source, out, **sections):
    text = str(source / "text.txt")
    values = {
        "model": {"path": str(source), "device": "cpu"},
        "calibration": {"data": text, "samples": 4, "length": 12},
        "prune": sections.get("prune", {"method": "wanda", "pattern": "2:4"}),
        "evaluate": {"data": text, "length": 12, "windows": 2},
        "output": {"path": str(out)} | sections.get("output", {}),
    }
    kind = StructuredConfig if prunes_units(values["prune"]) else Config
    return prunekit.plan(kind.model_validate(values))


def run(source, out, **sections):
    *_, finish = prunekit.run(planned(source, out, **sections))
    return finish.values


@pytest.mark.usefixtures("no_page", "proof_in_process")
@pytest.mark.parametrize(
    ("sections", "needs"),
    [
        ({}, False),
        ({"prune": {"method": "magnitude", "pattern": "2:4"}, "output": {"format": "2:4"}}, True),
        ({"prune": {"method": "magnitude", "pattern": "heads", "sparsity": 0.5}}, None),
    ],
    ids=["dense", "2:4", "heads"],
)
def test_a_card_says_where_the_model_is_from_and_what_was_measured(
    source, tmp_path, sections, needs
):
    report = run(source, tmp_path / "smaller", **sections)
    card = ModelCard.load(tmp_path / "smaller/README.md")
    data = card.data
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert data.tags == ["story", "a: b", "pruned", "prunekit"]
    assert data.datasets == ["roneneldan/TinyStories"]
    assert data.base_model == "someone/ancestor"
    assert data.pipeline_tag == "text-generation"
    assert "widget" not in data.to_dict()
    (result,) = data.eval_results
    (evaluation,) = report["evaluation"]
    assert result.metric_value == round(evaluation["after"], 6)
    assert "Secret sauce" not in card.text
    assert 'AutoModelForCausalLM.from_pretrained("smaller")' in card.text
    if needs is not None:
        assert ("import prunekit" in card.text) == needs
    assert evaluation["protocol"] in card.text.replace("\\", "")
    assert (tmp_path / "smaller/LICENSE").read_text() == "Apache"
    assert not [note for note in report["notes"] if "README" in note]


@pytest.mark.usefixtures("no_page", "proof_in_process")
def test_a_card_says_how_to_load_an_adapter(source, tmp_path):
    prune = {"method": "wanda", "pattern": "2:4", "recover": "lowrank", "recover_rank": 2}
    run(source, tmp_path / "out", prune=prune)
    text = (tmp_path / "out/README.md").read_text()
    assert 'PeftModel.from_pretrained(model, "out", subfolder="adapter")' in text


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        f"---\ntags: {'[' * 5000}{']' * 5000}\n---\n",
    ],
    ids=["broken", "list", "deep"],
)
def test_a_card_that_cannot_be_read_is_noted_in_the_plan(tmp_path, text):
    folder = checkpoints.write(tmp_path / "m")
    (folder / "README.md").write_text(text)
    facts, (note,) = model_card.source_facts(folder)
    assert facts == {}
    assert note in planned(folder, tmp_path / "out").notes


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("tags: 5", "tags is no text or list of texts"),
        ("tags: true", "tags is no text or list of texts"),
        ("tags: {a: b}", "tags is no text or list of texts"),
        ("tags: [[a, b]]", "tags is no text or list of texts"),
        ("tags: &a [*a]", "tags is no text or list of texts"),
        ("language: no", "language is no text or list of texts"),
        ("language: [en, no]", "language is no text or list of texts"),
        ("datasets: 3", "datasets is no text or list of texts"),
        ("base_model: {a: 1}", "base_model is no text or list of texts"),
        ("license_link: 2024-01-01", "license_link is no text in"),
        ("pipeline_tag: [a]", "pipeline_tag is no text in"),
        ('license_name: "\\ud800"', "license_name is no text in"),
        ("extra_gated_fields: [a]", "extra_gated_fields is no table in"),
        ("extra_gated_fields: {a: 2024-01-01}", "extra_gated_fields is no table in"),
    ],
)
def test_an_entry_of_another_type_is_left_out_with_a_note(tmp_path, entry, said):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{entry}\n---\n# x\n")
    facts, (note,) = model_card.source_facts(tmp_path)
    assert facts == {"license": "mit"}
    assert said in note
    ModelCard(model_card.render(REPORT, tmp_path, facts)).content.encode()


def test_entries_of_every_type_are_kept(tmp_path):
    entries = {
        "license": "mit", "tags": ["a", "5"], "language": "no", "base_model": ["a/b", "c/d"],
        "extra_gated_fields": {"Name": "text", "Job": {"type": "select", "options": ["A"]}},
    }  # fmt: skip
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(entries)}\n---\n")
    assert model_card.source_facts(tmp_path) == (entries, [])
    data = ModelCard(model_card.render(REPORT, tmp_path, entries)).data
    assert data.language == "no"
    assert data.to_dict()["extra_gated_fields"] == entries["extra_gated_fields"]


def test_a_model_without_a_card_gives_one_without_a_licence(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    assert model_card.source_facts(folder) == ({}, [])
    (folder / "README.md").write_text("no metadata")
    assert model_card.source_facts(folder) == ({}, [])


REPORT = {
    "prunekit": "1.0",
    "model": {"path": "org/base", "model_type": "llama", "architecture": "LlamaForCausalLM"},
    "sparsity": {"achieved": 0.5, "zeros": 1, "of": 2, "pattern": "2:4"},
    "layers": [],
    "config": {"prune": {"method": "wanda"}},
}


def test_hostile_names_stay_text_and_values_that_are_no_numbers_stay_out(tmp_path):
    evaluation = {
        "data": "a|b\n---\nlicense: mit\n<script>", "metric": "perplexity", "protocol": "x | `y`",
        "before": 2.0, "after": "inf",
    }  # fmt: skip
    source = {"license": "mit\n---\n# x", "tags": "one"}
    text = model_card.render(REPORT | {"evaluation": [evaluation]}, tmp_path / "a b", source)
    card = ModelCard(text)
    assert card.data.license == "mit\n---\n# x"
    assert card.data.tags == ["one", "pruned", "prunekit"]
    assert card.data.base_model == "org/base"
    assert card.data.eval_results is None
    assert card.text.count("<script>") == card.text.count("\\<script>") == 2
    (row,) = [line for line in card.text.splitlines() if line.startswith("| a")]
    assert row.count(" | ") == 4


def test_a_card_in_the_folder_of_the_shell_has_a_title(tmp_path, monkeypatch):
    (tmp_path / "smaller").mkdir()
    monkeypatch.chdir(tmp_path / "smaller")
    text = model_card.render(REPORT, Path(), {})
    assert "\n# smaller\n" in text
    assert '.from_pretrained("smaller")' in text
