"""Measures of units: the whole model and a pass over its blocks find the same."""

import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.distributed.ranks import SINGLE
from prunekit.models.load import load
from prunekit.models.vocabulary import load_tokenizer
from prunekit.runs.structured.result import view_heads
from prunekit.runs.structured.unit_scorer import BlockwiseScorer, WholeModelScorer
from prunekit.structured.rankers import rankers
from tests.support.structured import planned


def test_scores_entropies_and_views_are_the_same(llama, tmp_path):
    checkpoint = open_checkpoint(llama)
    ids = torch.randint(3, 16, (4, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids.split(2)]
    plan = planned(
        llama, tmp_path / "out", 'method = "magnitude"\npattern = "heads"\nsparsity = 0.5'
    )
    scorers = [
        WholeModelScorer(load(checkpoint, torch.float32), batches, batches, SINGLE),
        BlockwiseScorer(
            batches=batches, whole=batches, ranks=SINGLE, plan=plan, new_hidden_states=list
        ),
    ]
    found = []
    for scorer in scorers:
        with scorer.gates("heads") as gates:
            entropies = scorer.entropies(gates)
            scores = scorer.score(gates, rankers()["salience"]())
            truth = scorer.truth(gates)
            views = view_heads(gates, scores, scorer, load_tokenizer(checkpoint))
            found.append((entropies, scores, truth, views))
    (dense, *others), (streamed, *streamed_others) = found
    for name, sums in dense.items():
        for first, second in zip(sums, streamed[name], strict=True):
            torch.testing.assert_close(first, second)
    for first, second in zip(others[:2], streamed_others[:2], strict=True):
        for name, scores in first.items():
            torch.testing.assert_close(second[name], scores)
    assert others[2] == streamed_others[2]
