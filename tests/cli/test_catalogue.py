"""``prunekit list`` shows every name with its settings."""

from prunekit.cli.main import main


def test_list_names_everything_with_settings_and_defaults(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for word in ("sparsegpt", "damping = 0.01", "owl", "n:m", "cubic", "llama", "uniform"):
        assert word in shown
