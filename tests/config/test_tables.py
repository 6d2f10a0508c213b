"""Paths, hub ids and revisions; tables are frozen."""

import re

import pytest

from prunekit.config.load import load_config
from tests.support.configs import GOOD


def test_paths_are_seen_from_the_folder_of_the_config(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "models" / "m").mkdir(parents=True)
    (home / "a.txt").write_text("text")
    (home / "config.toml").write_text(
        GOOD.replace("Qwen/Qwen3-0.6B", "models/m").replace('"pydoc:train"', '["./x/../a.txt"]')
    )
    monkeypatch.chdir(tmp_path)
    config = load_config("home/config.toml", ["output.path=../out"])
    assert config.model.path == str(home / "models" / "m")
    assert config.calibration is not None
    assert config.calibration.data == [str(home / "a.txt")]
    assert config.output.path == str(tmp_path / "out")


@pytest.mark.parametrize("key", ["output.path", "model.path", "calibration.data"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x.txt", '"~nosuchuser/x.txt": there is no such user.'),
        ("a/\\u0000/x.txt", "names have up to 255 bytes."),
        ("é" * 128 + "/x.txt", "names have up to 255 bytes."),
        ("", '"" is not a path.'),
    ],
)
def test_a_path_that_no_file_can_have_is_refused(mistakes, key, path, message):
    (said,) = mistakes(GOOD, f'{key}="{path}"')
    assert said.endswith(message)


def test_hub_ids_are_left_alone(load):
    assert load(GOOD, "model.revision=main").model.path == "Qwen/Qwen3-0.6B"


def test_a_local_folder_has_no_revision(mistakes, tmp_path):
    (tmp_path / "m").mkdir()
    assert mistakes(GOOD, "model.path=m", "model.revision=main") == [
        "--set model.revision=main: FOLDER/m is a local folder and has no revisions."
    ]


def test_a_config_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load(GOOD).prune.steps = 2


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    ("table", "key", "unbounded"),
    [
        ("prune", "sparsity", 'method = "magnitude"\npattern = "unstructured"'),
        ("prune", "first_penalty", 'method = "alps"\npattern = "2:4"'),
        ("prune", "activation_power", 'method = "ria"\npattern = "2:4"'),
        ("prune", "damping", 'method = "obs"\npattern = "heads"\nsparsity = 0.5'),
    ],
)
def test_a_number_that_is_not_finite_is_refused(mistakes, table, key, unbounded, number):
    text = re.sub(r"\[prune\][^\[]*", f"[prune]\n{unbounded}\n{key} = {number}\n", GOOD)
    (found,) = mistakes(text)
    assert f"{table}.{key}: " in found
    assert "is not possible" in found or "is not a finite number" in found


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('method = "wanda"\npattern = "unstructured"\nsparsity = 0.5', "prune.steps"),
        ('method = "obs"\npattern = "heads"\nsparsity = 0.5', "prune.steps"),
        ('method = "obs"\npattern = "heads"\nsparsity = 0.5\n[train]', "train.steps"),
        ('method = "admm"\npattern = "2:4"', "prune.iterations"),
    ],
)
def test_more_steps_than_a_run_could_do_are_refused(mistakes, text, key):
    """They fit into 64 bits, and would never end."""
    text = re.sub(r"\[prune\][^\[]*", f"[prune]\n{text}\n", GOOD)
    (found,) = mistakes(text, f"{key}={2**63 - 1}")
    assert f"{key}={2**63 - 1}: " in found
    assert "at most" in found or "from 1 to 1,000,000" in found


LABELLED = {"calibration.task": '"classification"', "calibration.data": '"rows.tsv"'}


def changed(**keys):
    return [f"{name}={value}" for name, value in (LABELLED | keys).items() if value is not None]


def test_labelled_rows_are_files_with_columns(load, tmp_path):
    (tmp_path / "rows.tsv").write_text("gold\ttext\n")
    columns = {"calibration.columns": '{label = "gold"}'}
    calibration = load(GOOD, *changed(**columns)).calibration
    assert calibration is not None
    assert (calibration.task, calibration.columns) == ("classification", {"label": "gold"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"calibration.task": None}, "rows.tsv: holds labelled rows; set task to classification or "
         "seq2seq."),
        ({"calibration.task": '"ranking"'}, "choose"),
        ({"calibration.data": '"self"'}, '"self" has no labels; name files, or leave out task.'),
        ({"calibration.data": '"pydoc:train"'}, "Allowed: .tsv, .csv, .jsonl, .jsonl.gz, .parquet"),
        ({"calibration.columns": '{labl = "x"}'}, '"labl" is no column of task "classification": '
         "text, pair, label."),
        ({"calibration.task": None, "calibration.data": '"pydoc:train"',
          "calibration.columns": '{label = "x"}'}, "names columns of labelled data; set task."),
        ({"evaluate.data": '"pydoc:test"', "evaluate.samples": "3"}, "counts rows of"),
        ({"evaluate.task": '"classification"', "evaluate.data": '"rows.tsv"',
          "evaluate.windows": "3"}, "rows have no windows; write samples, or leave it out."),
        ({"evaluate.data": '"pydoc:test"', "evaluate.length": "64", "evaluate.stride": "65"},
         "65 is more than the 64 tokens of a window"),
    ],
)  # fmt: skip
def test_keys_of_labelled_rows_that_do_not_fit_are_refused(mistakes, tmp_path, keys, message):
    (tmp_path / "rows.tsv").write_text("text\tlabel\n")
    (said,) = mistakes(GOOD, *changed(**keys))
    assert message in said or message.capitalize() in said
