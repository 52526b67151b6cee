"""The last import of the server that forks the tests' processes: what they would read, and collect, again."""

import gc

from dreamlip_train.model.tokenizer import count_tokens

count_tokens("")
gc.collect()
gc.freeze()  # no collection of garbage walks through the server's modules, nor copies them in a forked process
