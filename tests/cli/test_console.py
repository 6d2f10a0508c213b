"""Text that rich or a terminal would take for a command is shown as it is."""

from rich.table import Table
from rich.text import Text

from prunekit.cli.app import print_line, print_table, report_error
from prunekit.cli.console import console

ODD = "a[/b][red]:x:\x1b[31m\u202e"
SHOWN = r"a[/b][red]:x:\x1b[31m\u202e"


def test_every_way_to_print_shows_a_name_as_it_is(capsys):
    table = Table("name", title=ODD)
    table.add_row(ODD)
    print_table(table)
    print_table(Text(ODD))
    print_table(ODD)
    print_line(ODD)
    said = capsys.readouterr().out
    assert said.count(SHOWN) == 5
    assert "\x1b" not in said
    report_error(2, ODD)
    console(stderr=True).print(ODD)
    assert capsys.readouterr().err.splitlines() == [SHOWN, SHOWN]
