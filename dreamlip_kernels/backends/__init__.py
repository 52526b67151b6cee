"""Which backend runs an op and why, the compiled extension, and the settings of the backends."""
