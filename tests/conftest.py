"""What every test may rely on: no network, no display, and no more threads than this
machine has cores.
"""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[1] / "../shared/objects"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")
# Before torch is imported, so that notebook kernels and subprocesses inherit it:
# xdist's workers share the cores. Only in the workers, which would inherit the number
# from the process that starts them. Threads that wait must not spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


@pytest.fixture(scope="session")
def shared_objects() -> Path:
    """The folder of real objects; skips the test where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the real objects in ../shared/objects are not here")
    return SHARED
