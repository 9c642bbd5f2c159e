import pytest


@pytest.fixture(autouse=True, scope="session")
def _short_measurements(short_measurements):
    """For all tests of this folder."""
