"""Token rows of the lengths that real sub-captions have, for tests and benchmarks."""

import torch

END = 49407
# Tokens of human and of machine sub-captions, start and end included: shares (%) of 1-8, 9-16, .. 49-56, 57-77.
HUMAN = (1.4, 17.7, 31.4, 25.1, 14.4, 6.6, 1.8, 1.5)
MACHINE = (1.1, 22.0, 41.2, 26.7, 7.4, 1.3, 0.2, 0.1)


def captions(count, shares, context=77, seed=0):
    """[count, context] tokens whose lengths have the given shares."""
    gen = torch.Generator().manual_seed(seed)
    group = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=gen)
    lengths = (8 * group + 1 + torch.randint(0, 8, (count,), generator=gen)).clamp(3, context)
    tokens = torch.randint(1, 49000, (count, context), generator=gen)
    position = torch.arange(context)
    tokens = torch.where(position < lengths[:, None], tokens, 0)
    tokens[torch.arange(count), lengths - 1] = END
    tokens[:, 0] = 49406
    return tokens
