"""The server that forks the fresh processes of all tests: it imports what they need once, of what is installed."""

import json
import os
from multiprocessing import forkserver, resource_tracker

PRELOADED = [
    "torch.distributed",
    "open_clip",
    "transformers.models.clip.image_processing_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "dreamlip_train.training.run",
    "dreamlip_train.reporting.curves",
    "dreamlip_train.reporting.grouping_figure",
    # What training imports only once it begins.
    "deepspeed",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
    "clip_benchmark.metrics.zeroshot_classification",
    "dreamlip_train.cli",
    "dreamlip_train.prepare.join.join",
    "dreamlip_train.prepare.recaption.recaption",
    "tests.support.processes.preloaded",  # last
]
_ADDRESS = "DREAMLIP_TEST_SERVER"


def address() -> dict[str, str]:
    """The variable that tells a process of this server, which is started if there is none."""
    own = forkserver._forkserver
    own.ensure_running()
    return {_ADDRESS: json.dumps(own._forkserver_address)}


def start() -> None:
    """In the process that starts those that run the tests, before it does: the server of them all."""
    os.environ.update(address())


def join() -> None:
    """Use the server of the environment's ``address``."""
    own = forkserver._forkserver
    own._forkserver_address = json.loads(os.environ[_ADDRESS])
    own._forkserver_alive_fd = os.pipe()[1]  # what it forks takes one; the server lives with who started it
    own.ensure_running = resource_tracker.ensure_running
