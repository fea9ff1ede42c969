"""Tests that the installations that the documentation names resolve."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers.paths import ROOT

#: Extras of the package and the constraints file of each installation.
INSTALLATIONS = {
    "alone": ("", "constraints.txt"),
    "with vLLM": ("[vllm]", "constraints-vllm.txt"),
    "with flash attention's hub kernels": ("[flash]", "constraints-vllm.txt"),
    "with both": ("[vllm,flash]", "constraints-vllm.txt"),
}


def pins(file: str) -> dict[str, str]:
    """Return the version of each package in a constraints file."""
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def pip(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt", "constraints-vllm.txt"])
def test_constraints_meet_the_declared_requirements(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, declared = pins(file), list(project["dependencies"])
    if file == "constraints-vllm.txt":
        declared += project["optional-dependencies"]["vllm"] + project["optional-dependencies"]["flash"]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_oldest_versions_are_the_declared_ends() -> None:
    """All of them but torch's, whose old versions have no build for CPUs on the package index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(found.name): found for found in map(Requirement, project["dependencies"])}
    lowest = {name: Version(next(iter(found.specifier)).version) for name, found in declared.items()}
    tested = {name: Version(pins("constraints-oldest.txt")[name]) for name in lowest}
    newer = {name for name, end in lowest.items() if tested[name].release[: len(end.release)] != end.release}
    assert newer == {"torch"}


def test_vllm_is_tested_in_the_version_of_the_constraints() -> None:
    tested = runpy.run_path(str(ROOT / "tests" / "install_vllm.py"))["VLLM"]
    assert tested.partition("==")[2] == pins("constraints-vllm.txt")["vllm"]


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTALLATIONS)
def test_installation_resolves(name: str) -> None:
    """pip finds versions of all packages that fit each other. Takes minutes and needs a package index."""
    if (index := pip("--no-deps", "--report", "-", "packaging", seconds=120)).returncode:
        pytest.skip(f"no package index answers: {index.stderr.strip().splitlines()[-1]}")
    extras, file = INSTALLATIONS[name]
    ran = pip("--report", "-", "--constraint", file, f".{extras}", seconds=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    packages = {package["metadata"]["name"]: package["metadata"]["version"] for package in json.loads(ran.stdout)["install"]}
    found = {canonicalize_name(package): version for package, version in packages.items()}
    for extra in re.findall(r"\w+", extras):
        assert {"vllm": "vllm", "flash": "kernels"}[extra] in found
    for package in ("torch", "transformers"):
        assert found[package].partition("+")[0] == pins(file)[package]
