"""A rank that waits says for what."""

import time

from dreamlip_train.monitoring.watchdog import Watchdog


def test_silence_is_broken_with_what_is_waited_for():
    said = []
    with Watchdog(
        3, said.append, lambda seconds: [f"worker 1 silent for over {seconds} s"], quiet_seconds=0.5
    ) as watchdog:
        for _ in range(6):
            watchdog.now("in step 7")
            time.sleep(0.1)
        assert not said
        watchdog.now("waiting for data")
        time.sleep(2.3)
    assert said[0].startswith("rank 3 has been waiting for data for") and "worker 1 silent for over 0.5 s" in said[0]
    assert 2 <= len(said) <= 4  # after each doubling, not at every look
