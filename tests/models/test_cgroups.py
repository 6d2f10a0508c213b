"""Memory and processors of control groups, versions 1 and 2, as a container shows them."""

import os

import pytest

from prunekit.models import cgroups

ONE = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "300"}
TWO = {"memory.max": "1000", "memory.current": "300"}
GROUPS = {
    "version 1": (
        "4:cpu,memory:/job",
        "memory/job",
        ONE,
        "inactive_file 1\ntotal_inactive_file 50",
    ),
    "version 2": ("0::/job", "job", TWO, "active_file 20\ninactive_file 30\nanon 7"),
    "of the job a step is of": ("0::/job/step", "job", TWO, "active_file 50"),
    "of a container": ("0::/named/outside", "", TWO, "active_file 50"),
    "none": ("0::/job", "job", TWO | {"memory.max": "max"}, "active_file 50"),
    "not of memory": ("3:cpu:/job", "cpu/job", TWO, "active_file 50"),
}
CPUS = {
    "version 1": ("4:cpu,cpuacct:/job", "cpu/job", "250000", 3),
    "version 2": ("0::/job", "job", "150000 100000", 2),
    "of the job a step is of": ("0::/job/step", "job", "50000 100000", 1),
    "of a container": ("0::/named/outside", "", "400000 100000", 4),
    "none": ("0::/job", "job", "max 100000", 8),
    "none of version 1": ("4:cpu,cpuacct:/job", "cpu/job", "-1", 8),
    "more than the machine": ("0::/job", "job", "9900000 100000", 8),
    "not of processors": ("3:memory:/job", "job", "150000 100000", 8),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a function that lays out one group, with the files of its folder."""
    monkeypatch.setattr(cgroups, "FILE_SYSTEM_ROOT", tmp_path)

    def root(line, path, files):
        files = {f"sys/fs/cgroup/{path}/{name}": content for name, content in files.items()}
        for place, content in {"proc/self/cgroup": f"9:name=systemd:/\n{line}", **files}.items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(f"{content}\n")

    return root


@pytest.mark.parametrize("name", GROUPS)
def test_a_control_group_limits_the_free_memory(name, root):
    line, path, files, statistics = GROUPS[name]
    root(line, path, files | {"memory.stat": statistics})
    limits = [*cgroups.free_memory()]
    assert limits == ([] if name in ("none", "not of memory") else [1000 - 300 + 50])


@pytest.mark.parametrize("name", CPUS)
def test_a_control_group_limits_the_processors(name, root, monkeypatch):
    line, path, limit, expected = CPUS[name]
    files = {"cpu.cfs_quota_us": limit, "cpu.cfs_period_us": "100000"}
    root(line, path, files if "version 1" in name else {"cpu.max": limit})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert cgroups.usable_cpus() == expected


def test_the_affinity_limits_the_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "FILE_SYSTEM_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert cgroups.usable_cpus() == 1
    assert [*cgroups.free_memory()] == []


def test_a_group_over_its_limit_has_nothing_free(root):
    root("0::/job", "job", {"memory.max": "100", "memory.current": "900", "memory.stat": ""})
    assert [*cgroups.free_memory()] == [0]
