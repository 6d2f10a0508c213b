"""The command ``prunekit advise``."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunekit.cli.app import Json, app, print_json, print_line
from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from prunekit.runs.advice.base import Advice

PRESETS = {"quality": "quality", "speed": "serving", "memory": "quality"}
"""The preset that is advised on for a model, by goal."""
MOST_ROUNDS = 10
"""Advice that is followed may call for other advice, but not for ever."""


@app.command
def advise(
    target: str,
    /,
    *,
    goal: Literal["quality", "speed", "memory"] | None = None,
    write: Path | None = None,
    as_json: Json = False,
) -> None:
    """Advise on a config, or make one for a model.

    Nothing is said of what is right as it stands. No weights are read.

    Args:
        target: A TOML file; or a checkpoint folder or hub id, for which a preset is advised on.
        goal: quality: the least loss; speed: a GPU or an engine that gains from it; memory: small
            files. Quality for a model, if left out.
        write: File for a config that follows the advice; it must not exist yet.
        as_json: Print JSON.
    """
    if is_config := target.endswith(".toml"):
        from prunekit.config.toml_source import TomlSource

        text, folder = TomlSource.read(Path(target)).text, Path(target).parent
    else:
        goal = goal or "quality"
        text, folder = _preset(target, goal), Path()
    if write and write.exists():
        raise ConfigError(f"{write}: exists already; name another file.")
    if write and is_config and write.parent.absolute() != folder.absolute():
        raise ConfigError(f"{write}: paths in a config start at its folder; write it to {folder}.")
    found = _advice(text, folder, goal)
    followed = _followed(text, folder, goal) if write else text
    if as_json:
        print_json([_values(each) for each in found])
    else:
        _print(found)
    if write:
        write.write_text(followed, encoding="utf-8")
        if not as_json:
            print_line(f"{write}: written; look at it with: prunekit plan {write}")


def _preset(model: str, goal: str) -> str:
    """Return the text of a config for a model."""
    from prunekit.config.toml_edit import with_changes

    name = f"{PRESETS[goal]}.toml"
    text = files("prunekit.cli").joinpath("presets", name).read_text("utf-8")
    return with_changes(text, {"model.path": model})


def _advice(text: str, folder: Path, goal: str | None) -> list["Advice"]:
    """Return the advice on the text of a config."""
    from prunekit.config.load import load_config_text
    from prunekit.config.run_config import SweepConfig
    from prunekit.runs import jobs
    from prunekit.runs.advice.base import Subject
    from prunekit.runs.advice.rules import advise
    from prunekit.runs.sweep.plan import SweepPlan

    config = load_config_text(text, folder)
    if isinstance(config, SweepConfig):
        raise ConfigError("advise: a sweep compares; advice is on a single run.")
    plan = jobs.plan(config)
    assert not isinstance(plan, SweepPlan)
    return advise(Subject.of(plan, goal))  # pyright: ignore[reportArgumentType]


def _followed(text: str, folder: Path, goal: str | None) -> str:
    """Return the text of a config that follows the advice."""
    from prunekit.config.toml_edit import with_changes

    for _ in range(MOST_ROUNDS):
        change = next((each.change for each in _advice(text, folder, goal) if each.change), None)
        if change is None:
            break
        text = with_changes(text, change)
    return text


def _values(advice: "Advice") -> Mapping[str, object]:
    keys = ("rule", "key", "text", "change")
    return {key: getattr(advice, key) for key in keys}


def _print(found: list["Advice"]) -> None:
    from prunekit.config.toml_source import quoted

    for each in found:
        print_line(f"{each.rule}  {each}")
        for key, value in each.change.items():
            print_line(f"    remove {key}" if value is None else f"    {key} = {quoted(value)}")
    if not found:
        print_line("Nothing to advise.")
