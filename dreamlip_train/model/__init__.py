"""Images and captions in, features out: the towers, the tokenizer, packed captions, and what a step costs in
operations.
"""
