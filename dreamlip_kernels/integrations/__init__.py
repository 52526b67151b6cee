"""K captions per image in the loops people already have: one module per framework, which needs that framework alone.

``open_clip``: a tokenizer and a CLIP for K captions.  ``transformers``: a CLIPModel for the Trainer.
``sentence_transformers``: a loss for K positives.
"""
