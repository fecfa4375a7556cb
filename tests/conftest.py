"""The option `--soak`: a test that takes the fixture `soak` then does its full count, instead of a twentieth."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="full counts of kills, fuzzed files and gigabytes")


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--soak"))
