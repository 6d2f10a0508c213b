"""Gradual pruning in the Trainer of transformers: exact, resumed, and the best is a pruned one."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

import prunekit
from prunekit.errors import CheckpointError, ConfigError
from prunekit.training.callback import FILE
from tests.support.architectures import tiny

SETTINGS = {"sparsity": 0.6, "end": 4, "every": 2}


def samples(count=12):
    ids = torch.randint(3, 60, (count, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, callback, model=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **{"max_steps": 6, "save_strategy": "no"} | settings,
    )
    return Trainer(
        model or tiny("llama"), arguments, train_dataset=samples(), eval_dataset=samples(4),
        callbacks=[callback],
    )  # fmt: skip


def assert_pruned(model, sparsity):
    for name, value in model.state_dict().items():
        if "proj" in name:
            assert int((value == 0).sum()) == int(sparsity * value.numel() + 1e-6), name


def test_a_trainer_prunes_to_the_exact_count_with_accumulated_batches(tmp_path):
    callback = prunekit.PruneCallback(**SETTINGS)
    run = trainer(tmp_path, callback, gradient_accumulation_steps=2)
    run.train()
    assert callback.pruner.step == 6
    assert callback.pruner.done
    assert_pruned(run.model, 0.6)
    assert not list(run.model.modules())[1]._forward_pre_hooks


@pytest.mark.parametrize("restored", [False, True])
def test_a_trainer_that_resumes_ends_with_the_same_bits(restored, tmp_path):
    tokens = torch.stack([each["input_ids"] for each in samples()])
    settings = SETTINGS | {"method": "wanda", "tokens": tokens, "regrow": 0.2, "regrow_every": 3}
    whole = trainer(tmp_path / "a", prunekit.PruneCallback(**settings))
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer(tmp_path / "b", prunekit.PruneCallback(**settings), **saving)
    first.train()
    assert sorted(path.name for path in (tmp_path / "b").glob("*/prunekit*")) == [FILE, FILE]
    exported = json.loads((tmp_path / "b" / "checkpoint-3" / "trainer_state.json").read_text())
    assert exported["stateful_callbacks"]["PruneCallback"]["args"]["sparsity"] == 0.6
    second = trainer(
        tmp_path / "b",
        prunekit.PruneCallback(**settings),
        tiny("llama"),
        restore_callback_states_from_checkpoint=restored,
        **saving,
    )
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    (callback,) = (
        each
        for each in second.callback_handler.callbacks
        if isinstance(each, prunekit.PruneCallback)
    )
    assert callback.pruner.done


def test_without_its_file_a_checkpoint_is_not_taken_up(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, prunekit.PruneCallback(**SETTINGS), **saving).train()
    file = tmp_path / "checkpoint-3" / FILE
    content = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(content[:50])):
        damage()
        with pytest.raises(CheckpointError, match=FILE):
            trainer(tmp_path, prunekit.PruneCallback(**SETTINGS), **saving).train(
                resume_from_checkpoint=str(file.parent)
            )
    moved = tmp_path / "moved"
    file.parent.rename(moved)
    (moved / FILE).write_bytes(content)
    callback = prunekit.PruneCallback(checkpoint=str(moved), **SETTINGS)
    trainer(tmp_path, callback, **saving).train(resume_from_checkpoint=str(moved))
    assert callback.pruner.done


def test_the_best_model_is_one_of_the_final_sparsity(tmp_path):
    """The loss rises with the sparsity, so the best of all would be the first."""
    run = trainer(
        tmp_path,
        prunekit.PruneCallback(sparsity=0.9, end=4),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    assert run.state.best_global_step >= 4
    assert_pruned(run.model, 0.9)


def test_an_end_beyond_the_training_is_refused(tmp_path):
    run = trainer(tmp_path, prunekit.PruneCallback(sparsity=0.5, end=7))
    with pytest.raises(ConfigError, match="end: step 7 comes after the training, which has 6"):
        run.train()
