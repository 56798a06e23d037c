import pytest
from backend import finish


@pytest.fixture(autouse=True)
def let_the_process_go():
    yield
    finish()
