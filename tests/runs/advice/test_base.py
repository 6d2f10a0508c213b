"""The subject of advice has what a plan knows of its model."""

from prunekit.runs.advice.base import Advice, Subject
from tests.support import checkpoints


def test_a_subject_has_the_shapes_of_what_is_pruned(tmp_path):
    plan = checkpoints.planned(
        checkpoints.write(tmp_path / "m"), tmp_path / "out", prune={"skip": ["*mlp*", "*o_proj"]}
    )
    subject = Subject.of(plan, "speed")
    assert len(subject.shapes) == 3 * len(plan.blocks)
    assert subject.writes_text
    assert subject.units is None
    assert str(Advice("a.b", "is better.")) == "a.b: is better."
