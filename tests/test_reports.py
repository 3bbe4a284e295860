"""Reports: the version of their keys first, keys in snake_case, and a reader that refuses what it does not know."""

import json
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

from minim_pipeline.files import SCHEMA_VERSION, read_report, write_report
from minim_pipeline.training.captions import load_captions


REPORTS = sorted(
    [*ROOT.glob("docs/**/*.json"), *ROOT.glob("research/**/report.json"), *ROOT.glob("minim_pipeline/**/report.json")]
)
# Keys that are names from the data: findings, networks, raters, noise levels.
NAMES = {finding for findings in load_captions().values() for finding in findings}
NAMES |= {"minim-encoder", "stand-in", "", "0.0", "1.0", "2.6", "4.0"}
NETWORKS = {"resnet", "convnextv2", *(f"efficientnet-lite{i}" for i in range(3))}
NAMES |= NETWORKS | {f"judge {name}" for name in NETWORKS}


def keys(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        yield from part
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from keys(each)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_report_has_a_version_and_snake_case_keys(path):
    assert next(iter(json.loads(path.read_text()))) == "schema_version"
    assert {key for key in keys(read_report(path)) if not re.fullmatch(r"[a-z0-9_]+", key)} <= NAMES


def test_all_stored_reports_are_looked_at():
    names = {path.relative_to(ROOT).as_posix() for path in REPORTS}
    assert {"docs/report.json", "docs/data.json", "docs/filter/report.json", "research/judges/report.json"} <= names


def test_what_was_written_is_read_and_another_version_refused(tmp_path):
    write_report(tmp_path / "report.json", {"n": 3})
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema_version": SCHEMA_VERSION, "n": 3}
    assert read_report(tmp_path / "report.json") == {"n": 3}
    for content, told in (
        ('{"schema_version": 2, "n": 3}', "its schema_version is 2, not 1"),
        ('{"n": 3}', "its schema_version is None, not 1"),
        ("[1]", "its schema_version is None, not 1"),
        ("{", "report.json is no report: "),
    ):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=told):
            read_report(tmp_path / "report.json")
