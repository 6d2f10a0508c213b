"""``[evaluate]``: texts, labelled rows and tasks of lm-eval."""

from pathlib import Path

from tests.support.configs import GOOD


def test_tasks_stand_beside_text_or_alone(load):
    alone = load(GOOD + '[evaluate]\ntasks = "arc_easy"\nfew_shot = 0\nlimit = 9\n').evaluate
    assert (alone.tasks, alone.data, alone.few_shot, alone.limit) == (["arc_easy"], [], 0, 9)
    Path("own.yaml").write_text("")
    both = load(GOOD + '[evaluate]\ndata = "pydoc:test"\ntasks = ["mmlu", "own.yaml"]\n').evaluate
    assert both.tasks == ["mmlu", str(Path("own.yaml").absolute())]


def test_mistakes_are_named(mistakes):
    def said(lines):
        return [line.partition(": ")[2] for line in mistakes(f"{GOOD}[evaluate]\n{lines}")]

    assert said("") == ["evaluate.data: missing. Name texts, or set tasks."]
    assert said('data = "pydoc:test"\nfew_shot = 1\nlimit = 2\n') == [
        "evaluate.few_shot: is a setting of tasks, and there are none.",
        "evaluate.limit: is a setting of tasks, and there are none.",
    ]
    assert said('tasks = "a"\nwindows = 1\nstride = 2\n') == [
        "evaluate.windows: is a setting of data, and there are none.",
        "evaluate.stride: is a setting of data, and there are none.",
    ]
    assert said('tasks = ["a", "a"]') == ["evaluate.tasks: a task is listed twice."]
    assert said('tasks = "no.yaml"') == ["evaluate.tasks: FOLDER/no.yaml: no such file."]
    (line,) = said('tasks = "arc easy"')
    assert line.startswith('evaluate.tasks: "arc easy" is no task: write a name such as "arc_easy"')
    assert said('tasks = "a"\n[gates]\nperplexity_increase = 0.1\n') == [
        "gates.perplexity_increase: of these data accuracy is measured; use accuracy_drop."
    ]
