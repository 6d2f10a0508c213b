"""Reports with wrong values are refused by the key; what is accepted can be shown."""

import copy
import json
import random

import pytest

from prunekit.cli.main import main
from prunekit.reports import report as reports
from prunekit.reports.schema.check import find_problem
from prunekit.runs.sweep import run as sweep
from tests.conftest import ROOT
from tests.support import checkpoints, structured, sweeps

EXAMPLE = json.loads((ROOT / "tests/support/example_report.json").read_text())
WRONG = [
    None, True, -1, 0, 3, 10**30, -(10**18), 2.5, 1e300, -1e300, float("nan"), "inf", "", "x",
    "../../etc/passwd", "\ud800", "x" * 5000, [], [None], [1, 2, 3], {}, {"a": 1}, [[0.5]],
    [[[]] * 3], "2:4", "9" * 60,
]  # fmt: skip
GONE = "<gone>"  # its name is part of test names


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    model = checkpoints.write(folder / "m")
    asked = 'method = ["obs"]\nsparsity = [0.25, 0.5]\ntokens = 2\n'
    config = sweeps.write_sweep(model, folder / "sweep", asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        units = structured.finished(model, folder / "units", structured.BOTH)
        patch.setattr(sweep, "run_in_subprocess", lambda function, *given: function(*given))
        assert main(["run", str(config), "--quiet"]) == 0
    compared = json.loads((folder / "sweep/report.json").read_text())
    return {"sparsify": EXAMPLE, "units": units, "sweep": compared}


KINDS = ["sparsify", "units", "sweep"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_writes_is_accepted(written, kind):
    assert find_problem(written[kind]) is None


def put(report, path, value):
    """Return a copy with a value at a path; GONE removes it."""
    changed = at = copy.deepcopy(report)
    for part in path[:-1]:
        at = at[part]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return changed


CASES = [
    ("sparsify", "prunekit", GONE),
    ("sparsify", "kind", "sparse"),
    ("sparsify", "kind", ["units"]),
    ("sparsify", "model", []),
    ("sparsify", "layers", {}),
    ("sparsify", "layers.0", 3),
    ("sparsify", "layers.0.tensor", GONE),
    ("sparsify", "layers.0.transposed", "no"),
    ("sparsify", "layers.0.shape", [3]),
    ("sparsify", "layers.0.shape.0", -3),
    ("sparsify", "layers.0.sparsity", 1.5),
    ("sparsify", "layers.0.sparsity", float("nan")),
    ("sparsify", "sparsity.zeros", "many"),
    ("sparsify", "sparsity.zeros", True),
    ("sparsify", "sparsity.pattern", "9" * 5000),
    ("sparsify", "proof.ids", []),
    ("sparsify", "proof.ids.0.0", -1),
    ("sparsify", "proof.ids.0.0", 1.5),
    ("sparsify", "proof.dtype", "load"),
    ("sparsify", "proof.device", "meta"),
    ("sparsify", "proof.answers", "all"),
    ("sparsify", "proof.answers.0", 1e300),
    ("sparsify", "proof.answers.0", float("nan")),
    ("sparsify", "proof.answers.0", float("inf")),
    ("sparsify", "proof.answers.0", "inf"),
    ("sparsify", "files", {"../m.safetensors": "00"}),
    ("sparsify", "files", {"/m.safetensors": "00"}),
    ("sparsify", "environment", []),
    ("units", "layers.0.kept", [99999]),
    ("units", "layers.0.kept", [0, 0]),
    ("units", "layers.0.scores", [0.5]),
    ("units", "layers.0.kind", "toes"),
    ("units", "layers.0.units", 0),
    ("units", "sparsity.removed", {"heads": [1]}),
    ("units", "views.heads.0.attention", [[1.0]]),
    ("sweep", "runs", []),
    ("sweep", "runs.0.evaluation", []),
    ("sweep", "dense.bytes", -1),
]


@pytest.mark.parametrize(("kind", "path", "value"), CASES, ids=str)
def test_each_wrong_value_is_one_error_that_names_its_key(written, kind, path, value, tmp_path):
    parts = [int(part) if part.isdigit() else part for part in path.split(".")]
    changed = put(written[kind], parts, value)
    problem = find_problem(changed)
    assert problem
    assert "\n" not in problem
    assert len(problem) < 300
    # Checks of several values name the table that holds them.
    named = problem.partition(":")[0].split(".")
    assert path.split(".")[: len(named)] == named or named[: len(parts)] == path.split(".")


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ([], "it is not a table"),
        ({"a": 10**30}, "more than 64 bits"),
        ({"a": "\ud800"}, "not Unicode"),
        ({"\ud800": 1}, "not Unicode"),
        ({"a": json.loads("[" * 30 + "]" * 30)}, "nested more than 20 deep"),
        (EXAMPLE | {"layers": EXAMPLE["layers"][:1] * 2}, "is listed twice"),
    ],
)
def test_what_no_page_can_show_is_refused(report, said):
    assert said in (find_problem(report) or "")


def nodes(value, path=()):
    """Yield the path of each value, of lists of the first three."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from nodes(value[key], (*path, key))
    elif isinstance(value, list):
        for place in range(min(len(value), 3)):
            yield from nodes(value[place], (*path, place))


def changed(report, count, seed):
    """Yield copies in which one value is wrong or gone."""
    places, chance = [*nodes(report)], random.Random(seed)
    for _ in range(count):
        yield put(report, chance.choice(places), chance.choice([*WRONG, GONE]))


@pytest.mark.parametrize("kind", KINDS)
def test_any_wrong_value_is_refused_or_accepted(written, kind):
    problems = [find_problem(each) for each in changed(written[kind], 400, 0)]
    assert 100 < sum(problem is not None for problem in problems) < 400


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_can_be_shown(written, kind):
    for each in changed(written[kind], 1000, 1):
        if find_problem(each) is None:
            reports.render(each).encode()
            reports._table(each).encode()
