"""A task of lm-eval over text of the tests.

lm-eval brings forty packages (0.5 GB), so the test environment has it only if it is asked for:
``.venv/bin/pip install -c tests/constraints.txt -e '.[harness]'``.
"""

import json

import pytest

INSTALL = "lm-eval is not installed: pip install -c tests/constraints.txt -e '.[harness]'"
QUESTIONS = [
    ("the quick brown", (" fox", " dogs")),
    ("pack my box with five", (" jugs", " dozen")),
    ("over the lazy", (" dog", " cat")),
    ("jumps over", (" box", " the")),
    ("five dozen", (" jugs", " fox")),
]


@pytest.fixture
def installed():
    pytest.importorskip("lm_eval", reason=INSTALL)


@pytest.fixture
def task_file(tmp_path):
    """Write a task of multiple choice over text of the test; return its file."""

    def write(**changes):
        rows = [
            {"question": question, "choices": choices, "answer": 0}
            for question, choices in QUESTIONS
        ]
        data = tmp_path / "questions.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": "own_words",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data), "train": str(data)},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "fewshot_split": "train",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 2.5},
        } | changes
        file = tmp_path / f"{task['task']}.yaml"
        file.write_text(json.dumps(task))  # JSON is YAML
        return str(file)

    return write
