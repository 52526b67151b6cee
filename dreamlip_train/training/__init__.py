"""A config in, a trained model out: the engine, the loop over steps, and the summary at the end.

DeepSpeed lies behind the engine.
"""
