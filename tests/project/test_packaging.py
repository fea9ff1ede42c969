"""Tests of the files with which the project is published: metadata, citation, workflows, and forms."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.version import Version

import opsd_lightning
from helpers.paths import ROOT

#: Files that a host or a tool reads, and the schema of each in check-jsonschema.
SCHEMAS = {
    ".github/workflows/ci.yml": "github-workflows",
    ".github/workflows/release.yml": "github-workflows",
    ".github/dependabot.yml": "dependabot",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/idea.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/result.yml": "github-issue-forms",
    ".readthedocs.yaml": "readthedocs",
    "CITATION.cff": "citation-file-format",
}


def check(path: str, schema: str) -> subprocess.CompletedProcess[str]:
    options = ["--default-filetype", "yaml", "--builtin-schema", f"vendor.{schema}"]
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *options, path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.integration
@pytest.mark.parametrize("path", SCHEMAS)
def test_files_of_the_host_match_their_schema(path: str) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    checked = check(path, SCHEMAS[path])
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_file_of_the_host_has_a_schema() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")}
    assert found == {path for path in SCHEMAS if path.startswith(".github/")}


def test_citation_names_this_version_and_the_paper() -> None:
    cited = yaml.safe_load(text("CITATION.cff"))
    assert cited["version"] == opsd_lightning.__version__
    paper = cited["preferred-citation"]
    assert len(paper["authors"]) == 7 and paper["volume"] == 306
    assert paper["url"].endswith("2601.18734")


def test_changelog_begins_with_this_version_and_goes_back() -> None:
    headings = re.findall(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)
    versions = [Version(heading) for heading in headings]
    assert headings[0] == opsd_lightning.__version__
    assert versions == sorted(versions, reverse=True) and len(set(versions)) == len(versions)


def test_workflows_run_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    for name in ("ci", "release"):
        jobs = yaml.safe_load(text(f".github/workflows/{name}.yml"))["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            command = step.get("run", "")
            assert set(re.findall(r"make ([\w-]+)", command)) <= targets
            assert all((ROOT / path).exists() for path in re.findall(r"constraints[\w-]*\.txt|\.ci/run", str(step)))


def test_release_publishes_without_a_stored_token() -> None:
    publish = yaml.safe_load(text(".github/workflows/release.yml"))["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in text(".github/workflows/release.yml")


def test_tested_versions_of_python_are_those_declared() -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    declared = {name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)}
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    first = [step["with"]["python-version"] for step in jobs["all"]["steps"] if "python-version" in step.get("with", {})]
    assert {*first, *jobs["python"]["strategy"]["matrix"]["python"]} == declared


def test_devcontainer_makes_an_environment_that_exists() -> None:
    found = json.loads(text(".devcontainer/devcontainer.json"))
    made = re.findall(r"\.venv/(\.\w+)", found["postCreateCommand"])
    assert made and all(f"$(VENV)/{name}:" in text("Makefile") for name in made)
