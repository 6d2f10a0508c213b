"""Stages: what may follow what."""

from prunekit.runs.stage import Stage


def test_each_stage_has_a_title_and_something_that_may_follow():
    for stage in Stage:
        assert stage.title
        assert stage.next
        assert stage not in stage.next
    assert len({stage.title for stage in Stage}) == len(Stage)


def test_whatever_runs_may_fail_or_be_stopped_and_what_ended_begins_anew():
    for stage in Stage:
        if stage.ended:
            assert stage.next == {Stage.IDLE}
        else:
            assert {Stage.FAILED, Stage.STOPPED} <= stage.next
            assert Stage.IDLE not in stage.next


def test_every_stage_can_be_reached_and_only_checked_models_are_complete():
    reached, todo = set(), [Stage.IDLE]
    while todo:
        stage = todo.pop()
        if stage not in reached:
            reached.add(stage)
            todo += stage.next
    assert reached == set(Stage)
    assert {each for each in Stage if Stage.COMPLETE in each.next} == {
        Stage.VERIFYING,
        Stage.EVALUATING,
        Stage.EXPORTING,
    }
