"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real filters and images that `MKF_TEST_DATA` names; tests that need it skip where it is unset."""
    value = os.environ.get("MKF_TEST_DATA")
    if not value:
        pytest.skip("MKF_TEST_DATA is not set: it names a folder of real filters and images")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"MKF_TEST_DATA={value} is not a folder")
    return path
