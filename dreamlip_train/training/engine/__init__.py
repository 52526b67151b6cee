"""The one place that knows DeepSpeed: its configuration, its engine, and the parameter groups."""
