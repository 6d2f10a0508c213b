"""The public names of ``prunekit``."""

from pathlib import Path

import pytest

import prunekit


def test_the_namespace_gives_what_it_promises():
    from prunekit.runs import jobs

    # Importing a submodule sets it as an attribute, which must not hide a promised name.
    assert prunekit.plan is jobs.plan
    assert prunekit.run is jobs.run
    modules = {path.stem for path in Path(prunekit.__file__).parent.iterdir()}
    assert not modules & set(prunekit.__all__)
    assert set(prunekit.__all__) <= set(dir(prunekit))
    for name in prunekit.__all__:
        assert callable(getattr(prunekit, name)), name


def test_the_namespace_refuses_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prunekit.nothing  # noqa: B018
