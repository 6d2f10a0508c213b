"""The report: measured values, in a self-contained HTML page."""

import copy
import errno
import json
import math
import re
from html.parser import HTMLParser

import pytest

from prunekit.errors import CapacityError, CheckpointError, ConfigError
from prunekit.reports import report
from tests.conftest import ROOT

EXAMPLE = json.loads((ROOT / "tests/support/example_report.json").read_text())
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A strictly parsed page: tags closed in order, unique ids."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.headings = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def example():
    return copy.deepcopy(EXAMPLE)


@pytest.fixture(scope="module")
def html():
    return report.render(EXAMPLE)


def test_page_says_the_measured_numbers(html):
    text = Page(html).text
    for fact in (
        "SmolLM2-135M",
        "sparsegpt",
        "2:4",
        "20.70 → 27.11 +31.0 %",
        "6.41 → 7.02 +9.5 %",
        "53.08 M of 106.2 M weights",
        "50.0 % sparse, target 50.0 %",
        "24 windows of 2048 tokens, no overlap",
        "1 min 35 s",
        "912 MB",
        "2:4: 208 linear layers compressed, 2 that it does not fit stay dense",
        "176 MB, -34.5 % from 269 MB",
        "Nothing was measured on NVIDIA H200",
        EXAMPLE["calibration"]["sha256"],
        "model.layers.2.mlp.down_proj",
        'method = "sparsegpt" # its own settings sit beside it',
        "glibc2.36",
    ):
        assert fact in text, fact


def test_page_needs_no_network(html):
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_ids_are_unique_and_every_reference_resolves(html):
    tags = [attributes for _, attributes in Page(html).tags]
    ids = [attributes["id"] for attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', html)
    assert references
    assert set(references) == set(ids)


def test_page_can_be_read_aloud(html):
    page = Page(html)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    pairs = zip(page.headings, page.headings[1:], strict=False)
    assert all(below <= above + 1 for above, below in pairs)
    images = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(images) == 2
    assert all("Heat map" in image["aria-label"] for image in images)


def test_hostile_text_stays_text(example):
    hostile = "</title><script>alert('x')</script><img src=x onerror=\"y\">&$\\frac$"
    example["model"]["path"] = hostile
    example["config_text"] = example["calibration"]["description"] = hostile
    example["config"]["prune"]["method"] = example["sparsity"]["pattern"] = hostile
    example["environment"][hostile] = hostile
    for entry in example["layers"] + example["evaluation"]:
        entry |= {key: f"{entry[key]}.{hostile}" for key in ("name", "data") if key in entry}
    page = Page(report.render(example))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert hostile in page.text


def test_two_renders_are_the_same_bytes(html):
    assert report.render(EXAMPLE) == html


def test_thirty_blocks_stay_under_300_kilobytes(example):
    example["layers"] = [
        entry | {"name": re.sub(r"\d+", str(block), entry["name"]), "block": block}
        for block in range(30)
        for entry in EXAMPLE["layers"][:7]
    ]
    assert len(report.render(example).encode()) < 300_000


def test_what_is_missing_is_left_out():
    bare = {
        "prunekit": "0.1.0",
        "model": {"path": "m"},
        "sparsity": {"achieved": 0.0},
        "layers": [{"name": "lm_head", "shape": [4, 4], "sparsity": 0.0, "relative_error": None}],
    }
    text = Page(report.render(bare)).text
    assert "0 % sparse" in text
    assert "Not measured" in text
    assert not re.search("Before and after|Cost|Calibration|None|nan", text)


def test_a_long_table_is_cut_and_says_so(example, monkeypatch):
    assert "The first" not in report.render(example)
    monkeypatch.setattr(report, "LAYERS_SHOWN", 5)
    assert "The first 5 are shown; report.json has them all." in Page(report.render(example)).text


def test_notes_are_on_the_page_and_many_are_cut_aloud(example):
    assert "<h2>Notes" not in report.render(example | {"notes": []})
    page = report.render(example | {"notes": ["lm_head <stays> dense."] * 23})
    assert page.count("lm_head &lt;stays&gt; dense.") == 20
    assert "3 more are in report.json" in page


def test_a_run_without_layers_renders(example):
    example["layers"] = []
    assert "Layer by layer" not in report.render(example)


def test_infinite_perplexity_is_shown_as_such(example, tmp_path):
    example["evaluation"][0]["after"] = math.inf
    example["evaluation"][1]["after"] = math.nan
    report.write(example, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert [found["after"] for found in written["evaluation"]] == ["inf", "nan"]
    for source in (example, report.load(tmp_path)):
        text = Page(report.render(source)).text
        assert "20.70 → ∞ +∞" in text
        assert "6.41 → NaN —" in text


def test_accuracy_is_shown_with_its_counts(example):
    measured = {"metric": "accuracy", "before": 0.8, "after": 0.75, "samples": 20}
    example["evaluation"][0] |= measured | {"correct": {"before": 16, "after": 15}}
    text = Page(report.render(example)).text
    assert "accuracy: 16 and 15 of 20 80.00 % 75.00 % -5.00 points" in text
    assert "Accuracy on" in text


def test_sequences_of_unlike_lengths_are_said_to_be(example):
    calibration = example["calibration"]
    assert "at most" not in Page(report.render(example)).text
    calibration["tokens"] = calibration["samples"] * calibration["length"] - 1
    assert Page(report.render(example)).text.count("at most") == 2


def test_broken_groups_are_said_aloud(example):
    assert "groups break" not in report.render(example)
    example["sparsity"]["violations"] = 3
    assert "3 groups break 2:4" in Page(report.render(example)).text


def test_grey_is_explained_only_where_something_is_not_measured(example):
    assert "Grey" not in report.render(example)
    example["layers"][0]["relative_error"] = None
    assert "Grey: not measured." in report.render(example)


def test_phases_add_up_to_the_total():
    phases = report._phases({"calibrate": 1.0, "prune": 6.0, "total": 10.0})
    assert phases == [("calibrate", 1.0, 10.0), ("prune", 6.0, 60.0), ("other", 3.0, 30.0)]


def test_what_was_written_loads_and_renders_the_same(tmp_path):
    report.write(EXAMPLE, tmp_path)
    assert report.load(tmp_path) == EXAMPLE
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == report.render(report.load(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.csv", "report.html", "report.json",
    ]  # fmt: skip


def test_an_interrupted_write_leaves_the_old_report(example, tmp_path, monkeypatch):
    report.write(EXAMPLE, tmp_path)
    monkeypatch.setattr("prunekit.checkpoint.atomic.os.fsync", _full_disk)
    example["seed"] = 7
    with pytest.raises(CapacityError, match="the disk is full"):
        report.write(example, tmp_path)
    assert report.load(tmp_path)["seed"] == 0


def _full_disk(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_without_a_report_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"no report\.json here.*prunekit run"):
        report.load(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        report.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "it is not a table"),
        ('{"prunekit": "0.1.0", "model": {}, "sparsity": {}}', "sparsity.achieved: Field required"),
    ],
)
def test_a_foreign_report_is_refused(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        report.load(tmp_path)


def test_a_training_has_its_curves_and_says_when_errors_were_measured(example, tmp_path):
    history = [
        {"step": 0, "loss": None, "held_out": 3.0, "sparsity": 0.0, "achieved": 0.0},
        {"step": 10, "loss": 2.5, "held_out": 2.5, "sparsity": 0.5, "achieved": 0.5},
    ]
    example["training"] = {
        "base": 2.0, "post": 3.0, "final": 2.5, "recovery": 0.5, "steps": 10, "history": history,
    }  # fmt: skip
    text = Page(report.render(example)).text
    assert "50.0 % of the loss recovered" in text
    assert "Before the training." in text
    report.write(example, tmp_path)
    assert (tmp_path / "training.csv").read_text().splitlines() == [
        "step,loss,held_out,asked,counted", "0,,3.0,0.0,0.0", "10,2.5,2.5,0.5,0.5",
    ]  # fmt: skip
    assert report.load(tmp_path)["training"] == example["training"]
    example["training"] |= {"post": None, "recovery": None}
    text = Page(report.render(example)).text
    assert "at best after the last pruning" in text
    assert "Relative squared error" not in text


def test_statistics_of_scores_are_in_the_table_of_layers_where_they_were_measured():
    measured = {"min": 0.25, "max": 8.5, "mean": 2.5, "std": 1.125}
    scored = copy.deepcopy(EXAMPLE)
    for layer in scored["layers"][1:]:
        layer["score_statistics"] = measured
    page = Page(report.render(scored)).text
    assert "Scores: mean ± deviation; range" in page
    mean, std, low, high = map(report.formatting.number, (2.5, 1.125, 0.25, 8.5))
    assert page.count(f"{mean} ± {std}; {low} to {high}") == len(scored["layers"]) - 1
    assert "Scores: mean" not in Page(report.render(EXAMPLE)).text
