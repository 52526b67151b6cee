"""What each op is asked on a device: inputs, the oracle in float64 and its slack, and the sizes that are timed."""
