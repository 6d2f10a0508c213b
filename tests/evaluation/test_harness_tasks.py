"""Loading of tasks of lm-eval, and what is refused before a run."""

import sys

import pytest

import prunekit
from prunekit.errors import ConfigError
from prunekit.evaluation.harness_tasks import HarnessTasks, digest, load_tasks
from tests.support import checkpoints

# Of the libraries that lm-eval imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("changes", "few_shot", "words"),
    [
        ({"doc_to_text": "{{nothing.at.all}}"}, None, "UndefinedError"),
        ({"test_split": "tset"}, None, "KeyError: 'tset'"),
        ({"unsafe_code": True}, None, "it runs code that the model writes"),
        ({"num_fewshot": 0}, 2, "it is defined without examples"),
        ({"dataset_path": "some/data", "dataset_kwargs": {}}, None, "HF_HOME"),
    ],
)
def test_a_task_that_cannot_run_is_refused(installed, task_file, changes, few_shot, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_tasks(HarnessTasks((task_file(**changes),), few_shot))
    assert str(caught.value).startswith("evaluate.tasks: ")


@pytest.mark.soak
def test_a_name_that_does_not_exist_is_refused(installed):
    with pytest.raises(ConfigError, match=r'no such task\. Did you mean "arc_easy"'):
        load_tasks(HarnessTasks(("arc_eesy",)))


def test_the_digest_is_of_questions_and_settings(installed, task_file):
    """And tasks are loaded once."""
    plain = HarnessTasks((task_file(),))
    assert load_tasks(plain) is load_tasks(HarnessTasks((task_file(),)))
    others = HarnessTasks((task_file(),), few_shot=2), HarnessTasks((task_file(task="b"),))
    assert len({digest(each) for each in (plain, *others)}) == 3


def test_without_lm_eval_the_plan_says_how_to_install_it(tmp_path, task_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    checkpoints.write(tmp_path / "m")
    (tmp_path / "config.toml").write_text(
        '[model]\npath = "m"\n[prune]\nmethod = "magnitude"\npattern = "2:4"\n'
        f'[evaluate]\ntasks = ["{task_file(task="other")}"]\n[output]\npath = "out"\n'
    )
    with pytest.raises(ConfigError, match=r"needs the package lm_eval: pip install 'prunekit\[har"):
        prunekit.plan(prunekit.load_config(tmp_path / "config.toml"))
