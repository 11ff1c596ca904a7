"""A second process beside pytest's own, as pytest leaves all cores but one idle: this one takes the tests from the
first on, that one from the last, and they meet. conftest.py has the hook at the end."""

import ast
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

FOLDER = "HIVG_BESIDE"  # set in the second process: the folder of what was taken, and of its reports
LEAST = 100  # tests for which it is worth it


def take(folder, item):
    """Whether this process is the one that runs the test: the first to make the folder of its number is."""
    try:
        (folder / str(item.number)).mkdir()
    except FileExistsError:
        return False
    return True


def file_of(folder, item):
    """Where the second process writes the reports of a test that it took."""
    return folder / str(item.number) / "reports"


class First:
    """In the first process. What the second one reports of a test is told where the test would have run."""

    def __init__(self, config):
        self.config = config
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        environment = os.environ | {FOLDER: self.temporary.name}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if take(self.folder, item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        file = file_of(self.folder, item)
        while not file.exists():
            if self.process.poll() is not None and not file.exists():  # it may have come in between
                pytest.exit(f"the second process of the tests ended in {item.nodeid}; run that one alone to see why", 1)
            time.sleep(0.1)
        for data in ast.literal_eval(file.read_text(encoding="utf-8")):
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self):
        self.process.terminate()
        self.process.wait()
        self.temporary.cleanup()


class Second:
    """In the second process: a file for each test, with all its reports."""

    def __init__(self, config):
        self.config = config
        self.folder = Path(os.environ[FOLDER])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if not take(self.folder, item):
            return True  # done
        self.reports = []
        self.file = file_of(self.folder, item)

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))
        if report.when == "teardown":  # the last
            part = self.file.with_suffix(".part")
            part.write_text(f"{self.reports}", encoding="utf-8")  # not JSON, which would make lists of tuples
            part.rename(self.file)


def is_slow(item):
    return item.get_closest_marker("slow") is not None


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    is_simple = not (config.option.collectonly or config.option.usepdb or hasattr(config, "workerinput"))  # of xdist
    if len(items) < LEAST or os.cpu_count() == 1 or not is_simple:
        return
    items.sort(key=is_slow)  # last, where the second process begins, so that the two meet at a short one
    for number, item in enumerate(items):
        item.number = number
    if FOLDER in os.environ:
        items.reverse()
    config.pluginmanager.register((Second if FOLDER in os.environ else First)(config))
