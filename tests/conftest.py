import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitizer: compiles and runs the operators under address and UB sanitizers")
