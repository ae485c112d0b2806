"""With FCMAE_REQUIRE_ALL=1 (continuous integration) a skipped test fails, unless it needs what nobody can install."""

from __future__ import annotations

import os

import pytest

NOT_TO_BE_INSTALLED = ("needs a GPU", "needs user and mount namespaces")


def _refuse_skip(report):
    if os.environ.get("FCMAE_REQUIRE_ALL") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(NOT_TO_BE_INSTALLED):
        report.outcome = "failed"
        report.longrepr = f"skipped although FCMAE_REQUIRE_ALL=1 asks for every component: {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    return _refuse_skip((yield))  # a module-level importorskip
