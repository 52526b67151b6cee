"""What ranks exchange: differentiable collectives, and the log-sum-exp over all of them."""
