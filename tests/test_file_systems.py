"""File systems that lack an operation, over whole commands."""

import errno
import fcntl
import os
import shutil
import stat
from types import SimpleNamespace

import pytest

from prunekit.checkpoint.journal import JOURNAL
from prunekit.checkpoint.lock import owner_file
from prunekit.errors import ConfigError
from prunekit.evaluation.verify import verify
from prunekit.inference.convert import convert
from prunekit.runs.sparsify.run import run
from tests.support import checkpoints
from tests.support.checkpoints import planned, same_bytes
from tests.support.fault_table import record

pytestmark = pytest.mark.usefixtures("proof_in_process")

LACKS = {
    "locks": {"flock": errno.ENOSYS},
    "locks, on NFS": {"flock": errno.ENOLCK},
    "flushing of folders": {"fsync": errno.EINVAL},
    "flushing of folders, on SMB": {"fsync": errno.EACCES},
    "a size": {"disk_usage": 0},
    "all of these": {
        "flock": errno.ENOSYS, "fsync": errno.EINVAL, "disk_usage": 0,
    },
}  # fmt: skip
"""Functions that fail on a file system, and their errors."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        yield checkpoints.write(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The output of a run on a usual file system."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    list(run(planned(model, folder)))
    return folder


class FileSystem:
    """A folder whose file system lacks operations.

    Attributes:
        folder: The folder.
        missing: The errors of the operations.
        failed: Operations that were called.
    """

    def __init__(self, folder, missing):
        self.folder, self.missing, self.failed = folder, missing, set()
        self._fsync = os.fsync

    def fail(self, name):
        self.failed.add(name)
        raise OSError(self.missing[name], os.strerror(self.missing[name]))

    def flock(self, *_):
        self.fail("flock")

    def fsync(self, opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            self.fail("fsync")
        self._fsync(opened)

    def disk_usage(self, _):
        self.failed.add("disk_usage")
        return SimpleNamespace(total=0, used=0, free=0)


OFTEN = ("locks", "flushing of folders", "permissions", "all of these")
"""The others differ from these by the number of the error."""


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.soak] * (name not in OFTEN)) for name in LACKS]
)
def lacking(request, monkeypatch, tmp_path):
    """A file system that lacks something."""
    made = FileSystem(tmp_path, LACKS[request.param])
    modules = {"flock": fcntl, "fsync": os, "disk_usage": shutil}
    for name in made.missing:
        monkeypatch.setattr(modules[name], name, getattr(made, name))
    return made


def stopped(plan, **options):
    """Carry out a run until its first block is written."""
    records = run(plan, **options)
    for each in records:
        if each.kind == "block":
            records.close()


def test_runs_are_resumed_and_overwritten_and_outputs_converted(model, whole, lacking, request):
    folder, out = lacking.folder, lacking.folder / "out"
    plan = planned(model, out)
    stopped(plan)
    assert not owner_file(out / JOURNAL).exists()
    *_, last = run(plan, resume=True)
    same_bytes(out, whole)
    noted = any("cannot flush a folder" in note for note in last.values["notes"])
    assert noted == ("fsync" in lacking.missing)
    stopped(plan, overwrite=True)
    list(run(plan, resume=True))
    same_bytes(out, whole)
    convert(out, folder / "packed", "2:4")
    convert(folder / "packed", folder / "dense", "dense")
    assert all(check.passed for check in verify(folder / "dense"))
    assert lacking.failed == lacking.missing.keys()
    outcome = "resumed, overwritten, converted: same bytes"
    record("file system", f"lacks {request.node.callspec.id}", outcome)


def test_two_runs_do_not_write_to_one_folder(model, lacking):
    plan = planned(model, lacking.folder / "out")
    records = run(plan)
    next(records)
    with pytest.raises(ConfigError, match="another run is writing to"):
        next(run(plan, resume=True))
    records.close()
