"""Environment and peak memory in reports."""

import importlib.metadata
import sys

import torch

from prunekit.models import cgroups
from prunekit.reports import environment

CPU = torch.device("cpu")


def test_versions_are_those_of_the_installed_packages():
    found = environment.environment(CPU)
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["device"].startswith("cpu: ")
    assert found["device"].endswith(" cores")
    assert found["threads"] == torch.get_num_threads()
    assert found["time"].endswith("+00:00")


def test_processors_are_those_that_the_process_may_use():
    assert environment.environment(CPU)["device"].endswith(f", {cgroups.usable_cpus()} cores")


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "prunekit-is-never-called-this"))
    found = environment.environment(CPU)
    assert "torch" in found
    assert "prunekit-is-never-called-this" not in found


def test_peak_memory_counts_what_the_process_has_held():
    before = environment.peak_memory(CPU)
    # As many bytes as the peak so far, all written.
    held = torch.ones(before["peak_rss_bytes"] // 4)
    after = environment.peak_memory(CPU)
    assert after["peak_rss_bytes"] >= before["peak_rss_bytes"] + held.nbytes // 4
    assert after["peak_device_bytes"] == 0
