"""Signals that ask a run to stop."""

import signal
import subprocess
import sys
import time

from tiny import clean_environment

SLEEPER = """
import time
from dreamlip_train.monitoring.stop_signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(200):
        time.sleep(0.1)
print(stop.name, flush=True)
"""


def test_the_same_signal_again_leaves_at_once_and_an_echo_does_not():
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    for number, pause in (
        (signal.SIGINT, 0.1),
        (signal.SIGINT, 0.1),
        (signal.SIGTERM, 1.3),
    ):  # a launcher's echo, then its own signal
        process.send_signal(number)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert said.count("finishing the step") == 1 and "SIGINT again: leaving now" in said
