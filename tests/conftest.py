"""Loads helpers.py, with all fixtures, where tests run: the process that only hands them out need not import torch."""

import warnings

import pytest


def pytest_configure(config: pytest.Config) -> None:
    has_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if config.getoption("collectonly") or not has_workers:
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # of Sacred's imports
            config.pluginmanager.import_plugin("helpers")
