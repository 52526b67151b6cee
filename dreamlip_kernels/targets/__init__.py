"""What a pair's logit is drawn to where that is not its own pair alone: smoothed labels, images known to be the same.

Sums of logits are linear in the features: no tile of pairs is visited for them (docs/math.md, section 4).
"""
