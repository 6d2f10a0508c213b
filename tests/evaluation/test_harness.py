"""Tasks of lm-eval on a checkpoint, against the questions answered one by one."""

import pytest
import torch
from torch.nn.functional import log_softmax

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.evaluation.harness import harness_measures
from prunekit.evaluation.harness_tasks import HarnessTasks, version
from prunekit.models import memory
from tests.support import checkpoints
from tests.support.architectures import tiny
from tests.support.harness import QUESTIONS

CPU = torch.device("cpu")
# Of the libraries that lm-eval imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def expected_hits(questions):
    """Return how many first answers are the likeliest, each scored alone."""
    model, plain, hits = tiny("llama"), checkpoints.tokenizer(), 0
    for question, choices in questions:
        scores = []
        start = plain(question)["input_ids"]
        for choice in choices:
            ids = torch.tensor([start + plain(choice)["input_ids"]])
            with torch.no_grad():
                logits = log_softmax(model(ids).logits.float(), -1)[0]
            places = range(len(start) - 1, ids.shape[1] - 1)
            scores.append(sum(float(logits[at, ids[0, at + 1]]) for at in places))
        hits += scores[0] > scores[1]
    return hits


def test_accuracy_is_that_of_each_answer_scored_alone(installed, tmp_path, task_file, capfd):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path / "m"))
    tasks = HarnessTasks((task_file(),), limit=4)
    capfd.readouterr()
    acc, norm = harness_measures(checkpoint, tasks, CPU)
    hits = expected_hits(QUESTIONS[:4])
    assert (acc["metric"], norm["metric"]) == ("acc", "acc_norm")
    assert (acc["value"], acc["samples"], acc["data"]) == (hits / 4, 4, "own_words")
    assert acc["stderr"] == pytest.approx((hits / 4 * (1 - hits / 4) / 3) ** 0.5)
    assert acc["higher_is_better"]
    facts = {"lm_eval": version(), "task_version": "2.5", "few_shot": 0, "documents": 5}
    assert acc["harness"] == facts
    assert "own_words version 2.5, 0-shot, the first 4 of 5 documents; batches" in acc["protocol"]
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_fit_is_placed_by_accelerate(
    installed, tmp_path, task_file, monkeypatch
):
    checkpoint, tasks = open_checkpoint(checkpoints.write(tmp_path / "m")), task_file()
    whole = harness_measures(checkpoint, HarnessTasks((tasks,), few_shot=1), CPU)
    assert "1-shot, all 5 documents" in whole[0]["protocol"]
    placed = []
    options = memory.device_map_options
    monkeypatch.setattr(memory, "free_host_bytes", lambda: checkpoint.nbytes // 2)
    monkeypatch.setattr(
        "prunekit.models.load.device_map_options",
        lambda *given: placed.append(options(*given)) or placed[-1],
    )
    assert harness_measures(checkpoint, HarnessTasks((tasks,), few_shot=1), CPU) == whole
    assert placed[0]["device_map"] == "auto"


def test_a_run_measures_before_and_after(installed, tmp_path, task_file, proof_in_process):
    """Also when it is resumed, and the questions are part of its identity."""
    folder, file = checkpoints.write(tmp_path / "m"), task_file()
    (tmp_path / "config.toml").write_text(
        f'[model]\npath = "m"\n[prune]\nmethod = "magnitude"\npattern = "2:4"\n'
        f'[evaluate]\ntasks = "{file}"\n[gates]\naccuracy_drop = 1.0\n[output]\npath = "out"\n'
    )
    plan = prunekit.plan(prunekit.load_config(tmp_path / "config.toml"))
    *records, finish = prunekit.run(plan)
    assert sum(record.kind == "evaluation" for record in records) == 4
    acc, norm = finish.values["evaluation"]
    assert (acc["metric"], acc["before"]) == ("acc", expected_hits(QUESTIONS) / 5)
    after = harness_measures(open_checkpoint(tmp_path / "out"), HarnessTasks((file,)), CPU)
    assert [acc["after"], norm["after"]] == [each["value"] for each in after]
    assert acc["harness"]["task_version"] == "2.5"
    assert finish.values["environment"]["lm_eval"] == version()
    (gate,) = finish.values["gates"]
    assert gate["where"].startswith("acc")
    page = (tmp_path / "out/report.html").read_text()
    assert "of 5 questions" in page
    assert "own_words version 2.5, 0-shot, all 5 documents" in page
    assert folder.is_dir()
