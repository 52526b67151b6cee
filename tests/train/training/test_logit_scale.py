"""The logit scale stays within its bounds, whatever the gradients."""

import pytest
from tiny import batch, tiny_config, tiny_engine

from dreamlip_train.training.step import move_batch, train_step


@pytest.mark.parametrize("stage", [1, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))])
def test_the_logit_scale_stays_within_bounds_and_does_not_wind_up(stage):
    """Pushed up by its gradient for a while and for three times as long, then down: it never leaves [1, 100],
    and comes back as soon both times.
    """
    way_back = []
    for pushes in (10, 25):
        config = tiny_config(stage)
        engine = tiny_engine(config)
        scales = [pushed(engine, sign) for sign in [1] * pushes + [-1] * 14]
        assert max(scales) == pytest.approx(100.0) and min(scales) >= 1.0
        way_back.append(sum(scale > 99 for scale in scales[pushes:]))
    assert way_back[1] <= way_back[0] + 1 and scales[-1] < 99, way_back


def pushed(engine, sign: int) -> float:
    """The logit scale that a step saw whose loss pushes it up (1) or down (-1)."""

    def loss_fn(**features):
        # The other outputs take part with weight zero: DeepSpeed wants every parameter's gradient.
        rest = sum(
            features[name].sum() for name in ("image_features", "patch_features", "text_features", "logit_scale_local")
        )
        return {"loss": -sign * features["logit_scale"].log() + 0.0 * rest}

    return float(train_step(engine, loss_fn, move_batch(batch(0), engine.device), 0.5).scales["logit_scale"])
