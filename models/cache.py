"""What a template remembers of earlier tokens, so that decoding computes only the new ones.

Rows have lengths of their own: a row's token at position p keeps its keys at index p, whatever the
other rows do. Inputs of different lengths are padded on the right. Padding is computed as if it
were text and then forgotten, since the row's next tokens are written over it before anything sees
it.

Shapes: B rows, S new tokens in a row, H heads, D head width.
"""

import torch
import torch.nn.functional as F

# Keys up to which attend_one is faster than PyTorch's attention, of rows that are equally long
SHORT = 256
CAPACITY = 64  # tokens a row has room for at first; doubled when they are used up


class KVCache:
    """Keys and values of each layer, and the last token's value of whatever a model looks back at.

    A model's decode() calls begin(), computes the new tokens, and calls end(). expected: rows that
    there will soon be, for which room is made at once.
    """

    expected = 0

    def __init__(self, rows, device=None, layers=None, attend_one=None):
        self.lengths = [0] * rows  # tokens that each row holds
        self.device = device
        self.layers = layers  # the model's, which need not take its banks apart for every token
        self.attend_one = attend_one  # an op for one new token in each row, or None
        self.blocks = None  # all layers for a few new tokens as one call, or None
        self.kv = {}  # layer -> keys and values, (B or more, capacity, H, D) each
        self.last = {}  # name -> (B, 1, ...): of each row's last token
        self.new = {}  # name -> (B, S, ...): the same of the tokens that are being computed
        self.texts = []  # (T,) int64 of each row, where a model asks for them
        # Of the tokens that are being computed
        self.counts = None
        self.n_new = 0
        self.tables = {}  # what layers have in common

    @property
    def rows(self):
        return len(self.lengths)

    def begin(self, n_new, counts):
        """Begin with n_new tokens in every row, of which the first counts[b] are row b's; each row
        has one or more."""
        self.n_new = n_new
        self.counts = counts
        self.tables = {}

    def end(self, counts=None):
        """Keep the new tokens, or only the first counts[b] of row b's, one or more; what follows
        those is forgotten."""
        self.counts = counts or self.counts
        self.lengths = [length + n for length, n in zip(self.lengths, self.counts)]
        self.last |= {name: self.of_last(x) for name, x in self.new.items()}
        self.new = {}
        self.texts = [text[:length] for text, length in zip(self.texts, self.lengths)]

    def keep(self, rows):
        """Forget all rows but these; `rows` are their numbers, in the order they will have.

        Only rows that get another place are copied; without rows, no memory is held.
        """
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        if moves:
            to, row = torch.tensor(moves, device=self.device).unbind(1)
            for keys, values in self.kv.values():
                keys[to] = keys[row]
                values[to] = values[row]
        if not rows:
            self.kv = {}
        self.lengths = [self.lengths[row] for row in rows]
        self.last = {name: x[index] for name, x in self.last.items()}
        self.texts = [self.texts[row] for row in rows if self.texts]

    def join(self, other):
        """Take over the rows of another cache of the same model, behind one's own."""
        own = self.rows
        if not own:  # weights may have changed since this one was made
            self.layers = other.layers
            self.blocks = other.blocks
        self.lengths = self.lengths + other.lengths
        self.texts = self.texts + other.texts
        for name, x in other.last.items():
            self.last[name] = torch.cat([self.last[name], x]) if own else x
        for layer, (keys, values) in other.kv.items():
            n = keys.size(1)
            room = self.room(layer, keys, n)
            for mine, theirs in zip(room, (keys, values)):
                mine[own : self.rows, :n] = theirs[: other.rows]

    # ----------------------------------------------------------------------------------------------
    # What a model asks for between begin() and end()

    def of_last(self, x):
        """(B, S, ...) -> (B, 1, ...): each row's last token that is no padding."""
        if self.n_new == 1:
            return x
        rows = torch.arange(self.rows, device=self.device)
        return x[rows, torch.tensor(self.counts, device=self.device) - 1][:, None]

    def texts_with(self, inputs):
        """The tokens of each row so far, with the new ones; a model that asks for them does so at
        every call."""
        new = [row[:n] for row, n in zip(inputs, self.counts)]
        if self.texts:
            new = [torch.cat(pair) for pair in zip(self.texts, new)]
        self.texts = new
        return new

    def previous(self, name, x, first):
        """(B, S, ...) -> the value one token earlier; `first` before a row's first token.

        name: of x, under which the last value is kept for the next call.
        """
        before = self.last.get(name, first[:, :1])
        self.new[name] = x
        return torch.cat([before, x[:, :-1]], dim=1)

    def positions(self, n=1):
        """(B, n S) int64: of the new tokens in their rows; n: turns that each token takes."""
        if ("positions", n) not in self.tables:
            start = torch.tensor(self.lengths, device=self.device)[:, None]
            new = torch.arange(n * self.n_new, device=self.device)
            self.tables["positions", n] = n * start + new
        return self.tables["positions", n]

    def attend(self, layer, q, k, v, window, scale):
        """Attention of the new tokens to what their rows hold, and to themselves.

        q: (B, n S, H, D), where each token takes n turns; k, v: the same, or with fewer heads that
        divide H -> (B, n S, H, D). window: turns before a query that it may see; scale: of the
        products.
        """
        n = q.size(1) // self.n_new
        shortest = min(self.lengths)
        alike = shortest == max(self.lengths)
        end = n * (max(self.lengths) + self.n_new)
        keys, values = self.room(layer, k, end)
        short = not alike or end <= SHORT
        if self.attend_one and q.size(1) == 1 and short:
            lengths = self.positions()[:, 0]
            return self.attend_one(q, k, v, keys, values, lengths, window, scale)
        if alike:
            keys[: self.rows, n * shortest : end] = k
            values[: self.rows, n * shortest : end] = v
        else:
            rows = torch.arange(self.rows, device=self.device)[:, None]
            keys[rows, self.positions(n)] = k
            values[rows, self.positions(n)] = v

        # Only what a query may see is read; one query in each of such rows sees all of that
        begin = max(0, n * shortest - window)
        one = alike and q.size(1) == 1
        whole = alike and not shortest and end <= window + 1  # a text from its beginning
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[: self.rows, begin:end].transpose(1, 2),
            values[: self.rows, begin:end].transpose(1, 2),
            attn_mask=None if one or whole else self.mask(n, window, begin, end),
            is_causal=whole and not one,
            scale=scale,
            enable_gqa=q.size(2) != k.size(2),
        )
        return y.transpose(1, 2)

    def rooms(self, n_layers, shape, dtype):
        """Every layer's keys and values with room for the new tokens; shape: (H, D)."""
        like = torch.empty(0, 0, *shape, dtype=dtype, device=self.device)
        end = max(self.lengths) + self.n_new
        return [self.room(layer, like, end) for layer in range(n_layers)]

    def room(self, layer, k, end):
        """A layer's keys and values with room up to index `end` in all rows; like k otherwise."""
        keys, values = self.kv.get(layer) or (k[:0, :0], k[:0, :0])
        rows = grown(keys.size(0), max(self.rows, self.expected))
        capacity = grown(keys.size(1), end, CAPACITY)
        if keys.shape[:2] != (rows, capacity):
            more = (0, 0, 0, 0, 0, capacity - keys.size(1), 0, rows - keys.size(0))
            keys = F.pad(keys, more)
            values = F.pad(values, more)
            self.kv[layer] = keys, values
        return keys, values

    def mask(self, n, window, begin, end):
        """(B, 1, n S, end - begin) bool: which keys each query sees."""
        if (n, window) not in self.tables:
            at = self.positions(n)[:, None, :, None]
            seen = torch.arange(begin, end, device=self.device)
            self.tables[n, window] = (seen <= at) & (seen >= at - window)
        return self.tables[n, window]


def grown(size, needed, least=1):
    """The size of what has to hold so many: the same while it does, else doubled."""
    if needed <= size:
        return size
    return max(needed, 2 * size, least)


# --------------------------------------------------------------------------------------------------
# Templates that have no decode()


def decoder_of(model):
    """What has new_cache() and decode(): the model, or something that computes all tokens anew."""
    return model if hasattr(model, "decode") else Recomputing(model)


class Recomputing:
    """new_cache() and decode() by a model's logits()."""

    def __init__(self, model):
        self.model = model

    def new_cache(self, rows):
        return TokenCache(rows)

    def decode(self, inputs, counts, cache, stage):
        logits = []
        for row, new, n in zip(cache.tokens, inputs.tolist(), counts):
            row += new[:n]
            text = torch.tensor([row], device=inputs.device)
            cu_seqlens = torch.tensor([0, len(row)], dtype=torch.int32, device=inputs.device)
            logits.append(self.model.logits(text, cu_seqlens, stage, last_only=True)[0, -1])
        return torch.stack(logits)


class TokenCache:
    """The tokens of each row."""

    def __init__(self, rows):
        self.tokens = [[] for _ in range(rows)]

    @property
    def lengths(self):
        return [len(row) for row in self.tokens]

    def keep(self, rows):
        self.tokens = [self.tokens[row] for row in rows]

    def join(self, other):
        self.tokens = self.tokens + [list(row) for row in other.tokens]
