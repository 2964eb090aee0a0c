"""The golden cases under test: those of tests/golden/data, or of the folder given by --goldens."""

import pytest

from tests.golden.cases import Goldens


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Goldens:
    return Goldens(request.config.getoption("--goldens"))
