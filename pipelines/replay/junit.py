"""A replay as JUnit XML, so that a CI system shows each refusal, broken guardrail and failed self-check as a test."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from pipelines.replay.report import ReplayReport


def write_junit(report: ReplayReport, path: Path) -> None:
    """A test case a policy's weights, a guardrail and a self-check each; what the log does not say is skipped."""
    suite = ET.Element("testsuite", name="reelrank replay")
    for check in report.self_checks:
        _case(suite, "self-check", check.name, None if check.passed else check.detail)
    for result in report.policies:
        _case(suite, result.policy, "the log can answer", "; ".join(result.refused) or None)
        broken = {g.metric for g in result.broken}
        for g in result.guardrails:
            case = _case(
                suite,
                result.policy,
                f"guardrail {g.metric}",
                f"{g.difference.estimate:+.4f} against the logged {g.logged:.4f}, allowed {g.limit:.4f}: {g.why}"
                if g.metric in broken
                else None,
            )
            if g.state == "not logged" or result.refused:
                ET.SubElement(case, "skipped", message=g.state if g.state == "not logged" else "the policy is refused")
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    ET.SubElement(suite, "system-out").text = report.verdict
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _case(suite: ET.Element, owner: str, name: str, failure: str | None) -> ET.Element:
    case = ET.SubElement(suite, "testcase", classname=f"replay.{owner}", name=name)
    if failure is not None:
        ET.SubElement(case, "failure", message=failure).text = failure
    return case
