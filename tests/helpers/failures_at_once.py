"""A pytest plugin that writes each failure when it happens, so that a run that is cut off has reported those it saw.

``GROOTVL_FAILURES=FILE python -m pytest -p tests.helpers.failures_at_once ...``
"""

import os
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the name and the traceback of what failed; with pytest-xdist in the main process only."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ["GROOTVL_FAILURES"]).open("a", encoding="utf-8") as file:
            file.write(f"{report.outcome.upper()} {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
