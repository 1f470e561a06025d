"""A plain loop over the language model, and inputs for it."""

import torch
from transformers.generation.streamers import BaseStreamer

CODES, NULL = 32, 37  # codebook size and null class of the tiny model
GUIDANCE = [4.0, 1.0, (1.1, 8.0), [3.0, 0.0]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def classes(*labels):
    return torch.tensor([[CODES + label] for label in labels])


def sequences(batch=2, length=16, seed=0):
    codes = torch.randint(0, CODES, (batch, length), generator=seeded(seed))
    return torch.cat([classes(*[i % 5 for i in range(batch)]), codes], dim=1)


def scale_at(guidance, position, length=16):
    start, end = guidance if isinstance(guidance, (tuple, list)) else (guidance, guidance)
    return start + (end - start) * position / (length - 1)


@torch.no_grad()
def guided_logits(model, label, codes, guidance):
    """Logits of the next code: two unbatched passes over the whole sequence, no cache."""
    conditional = model(torch.tensor([[CODES + label, *codes]]), use_cache=False).logits[0, -1]
    unconditional = model(torch.tensor([[NULL, *codes]]), use_cache=False).logits[0, -1]
    return unconditional + scale_at(guidance, len(codes)) * (conditional - unconditional)


def plain_loop(model, labels, guidance, length=16):
    """Greedy decoding of one label after the other."""
    rows = []
    for label in labels:
        codes = []
        for _ in range(length):
            codes.append(int(guided_logits(model, label, codes, guidance).argmax()))
        rows.append(codes)
    return torch.tensor(rows)


def count_forwards(model):
    """Shapes of the token ids of every forward pass from now on."""
    shapes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def stream(model, labels, **options):
    return torch.cat(list(model.stream_codes(labels, **options)), dim=1)


class Collector(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True
