"""Pages of the documentation are shipped, listed and shown."""

import re

import pytest

from prunekit.cli.docs import pages
from prunekit.cli.main import main
from tests.conftest import ROOT


def test_all_pages_are_listed_with_their_titles(capsys):
    assert main(["docs"]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in listed] == [*pages()]
    for name, title in listed:
        assert pages()[name].read_text("utf-8").startswith(f"# {title}\n")


@pytest.mark.parametrize("topic", pages())
def test_a_page_is_shown_as_it_is_where_no_terminal_is(topic, capsys):
    assert main(["docs", topic]) == 0
    assert capsys.readouterr().out == pages()[topic].read_text("utf-8")


def test_a_terminal_gets_it_rendered(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["docs", "plugins"]) == 0
    shown = capsys.readouterr().out
    assert "A method of your own" in shown
    assert "```" not in shown


def test_a_misspelt_page_is_refused_with_the_names(capsys):
    assert main(["docs", "methds"]) == 2
    said = capsys.readouterr().err
    assert "Did you mean methods?" in said
    assert "sweeps" in said


@pytest.mark.parametrize("page", ["README.md", *(f"prunekit/docs/{name}.md" for name in pages())])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_the_readme_names_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert set(re.findall(r"prunekit/docs/(\w+)\.md", text)) == set(pages())
    assert len(text.splitlines()) < 250
