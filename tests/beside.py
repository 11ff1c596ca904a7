"""The tests marked `slow` in a process of their own, beside the others, where both kinds are asked for: alone, pytest
leaves all cores but one idle. conftest.py has the hook at the end."""

import ast
import os
import subprocess
import sys
import tempfile
import time

import pytest

REPORTS = "HIVG_SLOW_REPORTS"  # set in the process of the slow tests: the file for its reports


class Beside:
    """The process of the slow tests; in their place, what it reports of them is told."""

    def __init__(self, config):
        self.config = config
        self.file = tempfile.NamedTemporaryFile("r", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        environment = os.environ | {REPORTS: self.file.name}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if not is_slow(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        report = None
        while report is None or report.when != "teardown":
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=self.next_report())
            assert report.nodeid == item.nodeid
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def next_report(self):
        line = ""
        while not line.endswith("\n"):
            is_alive = self.process.poll() is None  # before the look: its last report may come in between
            part = self.file.readline()
            if not part and not is_alive:
                pytest.exit("the process of the slow tests ended too early; python -m pytest -m slow shows why", 1)
            if not part:
                time.sleep(0.1)
            line += part
        return ast.literal_eval(line)

    def pytest_unconfigure(self):
        self.process.terminate()
        self.process.wait()


class Reporter:
    """In the process of the slow tests: a line for each report."""

    def __init__(self, config):
        self.config = config
        self.file = open(os.environ[REPORTS], "w", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(f"{data}\n")  # not JSON, which would make lists of tuples


def is_slow(item):
    return item.get_closest_marker("slow") is not None


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if is_slow(item)]
    if REPORTS in os.environ:
        items[:] = slow
        config.pluginmanager.register(Reporter(config))
        return
    is_simple = not (config.option.collectonly or config.option.usepdb or hasattr(config, "workerinput"))  # of xdist
    if 0 < len(slow) < len(items) and os.cpu_count() > 1 and is_simple:
        items.sort(key=is_slow)  # the others first
        config.pluginmanager.register(Beside(config))
