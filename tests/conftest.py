import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitizer: compiles and runs the operators under address and UB sanitizers")


@pytest.fixture(autouse=True)
def settings():
    """Training in this process flushes denormal numbers and compiles no more; not so for the next test."""
    yield
    torch.set_flush_denormal(False)
    torch.compiler.set_stance("default")
