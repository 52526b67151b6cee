"""Which losses are spikes."""

import pytest

from dreamlip_train.monitoring.loss_spikes import LossSpikes


def test_what_is_a_spike_and_what_is_noise():
    spikes = LossSpikes()
    noise = [3 + 0.1 * ((7 * i) % 11 - 5) / 5 for i in range(100)]
    assert [spikes.check(loss) for loss in noise] == [None] * 100
    assert spikes.check(float("nan")) is None and spikes.check(3.3) is None
    assert spikes.check(6.0) == pytest.approx(3.0, abs=0.05)
    falling = LossSpikes()
    assert [falling.check(10 * 0.99**i) for i in range(300)] == [None] * 300
    assert LossSpikes().check(1e9) is None  # nothing to compare it with
