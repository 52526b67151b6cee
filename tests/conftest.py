"""Every torch.empty of the suite is filled with NaN: an output element nobody wrote shows itself.

Without a CUDA device Triton's interpreter runs the kernels; it must be on before triton is first imported.
"""

import gc
import multiprocessing
import os
import signal
import tempfile

import fork_server
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell's background job ignores Ctrl-C, and so would all that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A verdict on this machine that its user has stored must not choose what the tests run.
_cache = tempfile.TemporaryDirectory(prefix="dreamlip-cache-")
os.environ["DREAMLIP_CACHE_DIR"] = _cache.name
if "DREAMLIP_TEST_RUN" not in os.environ:  # shared by all processes of this run (once.py)
    _run = tempfile.TemporaryDirectory(prefix="dreamlip-run-")
    os.environ["DREAMLIP_TEST_RUN"] = _run.name


def pytest_configure(config):
    """The processes of ``pytest -n`` share one server that forks their tests' processes."""
    multiprocessing.set_forkserver_preload(fork_server.PRELOADED)
    if hasattr(config, "workerinput"):
        fork_server.join()
    elif config.getoption("numprocesses", None):
        fork_server.start()


@pytest.fixture(autouse=True)
def poisoned_empties():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


# Files of twenty seconds and more come first: the processes share the files, and none should end with a long one.
_LONG = (
    "test_two_ranks",
    "test_train",
    "test_interrupted",
    "test_join_faults",
    "test_recaption",
    "test_faults",
    "test_contrast_executed",
    "test_logsumexp_triton",
    "test_import_weights",
    "test_export",
    "test_first_build",
    "test_contrastive",
    "test_checkpoint",
    "test_map_tasks",
    "test_extension",
    "test_compile_only",
    "test_csrc_contrast_executed",
    "test_grouping_executed",
    "test_grouping_triton",
    "test_qualify",
    "test_contrastive_promises",
    "test_engine",
    "test_grad_cache",
    "test_loader",
    "test_weight_files",
    "test_targets",
    "test_contrastive_triton",
    "test_ablate",
    "test_distributed_compiled",
    "test_qualify_real",
    "test_contrastive_emulated",
    "test_cuda_emulated",
    "test_logsumexp_emulated",
)


def pytest_collection_finish():
    """What the tests' imports left is there until the end: no later collection of garbage walks through it, nor copies
    it in a forked process.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """So that what is left can be collected: DuckDB reports what lives longer than the interpreter."""
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(_LONG)))
