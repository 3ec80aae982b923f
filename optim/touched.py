"""Which rows of token tables have a gradient, so that ranks need not exchange the others.

A rank's tokens look up some of a table's rows, and all other rows of its gradient are zero. Of
gpt2-small's 377,280 rows of n-grams it is 16,000 to 41,000 in two steps. The rows follow from the
tokens, and the batch of every rank from the step, so each rank works out for itself, in the thread
that makes batches, what it sends and what it gets: one all-to-all of the rows themselves is left,
and nobody waits for counts, least of all from a device.
"""

import typing

import torch

# A table pays where no rank touches more than one row in so many. On H100s, by counting, a byte
# takes about twice as long as one that is reduce-scattered: kernels copy it out and add it up
ONE_IN = 3


class Touched(typing.NamedTuple):
    """Rows of one table that a machine's ranks exchange; int64."""

    mine: torch.Tensor  # (n,) of this rank's gradient, ascending, so owner by owner
    sends: list  # how many of them to each owner
    theirs: torch.Tensor  # (m,) within this rank's part, ascending for each sender in turn
    receives: list  # how many of them from each sender

    def to(self, device):
        mine = self.mine.to(device, non_blocking=True)
        theirs = self.theirs.to(device, non_blocking=True)
        return self._replace(mine=mine, theirs=theirs)


class TouchedRows:
    """This rank's batches, and what its machine's ranks touch by them until a table's turn.

    One object goes through successive steps, from where the optimizer is; it looks at tables whose
    parts are whole rows.
    """

    def __init__(self, optimizer, model):
        self.world = world = optimizer.world
        self.touches = getattr(model, "touched_rows", None)
        self.steps = optimizer.step_count
        self.found = {}  # step -> {table: Touched}
        self.tables = {}  # name -> (rows of a part, steps between turns)
        self.marks = {}  # name -> (ranks, rows) bool; None: before the first whole turn
        if world.local_size == 1 or self.touches is None:
            return
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        for name in self.touches(nothing, torch.tensor([0, 1])):
            rule = optimizer.rules.get(name)  # None where the table is empty
            if rule is None or not rule.sharded:
                continue
            shard = optimizer.shards[name]
            p = optimizer.params[name]
            elements = shard.n * shard.whole[:1].numel()  # of a part
            if elements % p.size(-1) == 0:
                self.tables[name] = elements // p.size(-1), rule.every
                if self.steps % rule.every == 0:
                    self.marks[name] = self.no_marks(p)
        self.params = optimizer.params

    def no_marks(self, p):
        return torch.zeros(self.world.local_size, p.numel() // p.size(-1), dtype=torch.bool)

    def batch(self, loader, step, micro_rows):
        """This rank's micro-batches of the next step; rows(step) then has what is due."""
        rank, size, local = self.world.rank, self.world.size, self.world.local_size
        if not self.tables or not hasattr(loader, "of_ranks"):
            return list(loader.micro_batches(step, rank, size, micro_rows))
        first = rank - rank % local
        batches = loader.of_ranks(step, range(first, first + local), size, micro_rows)
        self.found[step] = self.note(batches)
        return batches[rank % local]

    def rows(self, step):
        """{table: Touched} for the sums of this step."""
        return self.found.pop(step, {})

    def note(self, batches):
        """{table: Touched} of what is due after a step with these batches of each rank."""
        if not self.tables:
            return {}
        self.steps += 1
        for place, batch in enumerate(batches):
            for micro in batch:
                for name, rows in self.touches(micro.inputs, micro.cu_seqlens).items():
                    if name in self.marks:
                        self.marks[name][place, rows] = True
        found = {}
        for name, (part, every) in self.tables.items():
            if self.steps % every == 0:
                marks = self.marks.get(name)
                self.marks[name] = self.no_marks(self.params[name])
                if marks is not None:
                    found[name] = self.exchange(marks, part)
        return {name: rows for name, rows in found.items() if rows is not None}

    def exchange(self, marks, part):
        """The Touched of marks (ranks, rows), of which each rank owns `part` in turn; None where
        it does not pay, on all ranks alike."""
        rows = [mark.nonzero().flatten() for mark in marks]
        ranks, n_rows = marks.shape
        if ONE_IN * max(map(len, rows)) > n_rows:
            return None
        place = self.world.rank % ranks
        borders = part * torch.arange(ranks + 1)  # between owners
        at = torch.stack([torch.searchsorted(row, borders) for row in rows])  # (ranks, ranks + 1)
        begin, end = at[:, place].tolist(), at[:, place + 1].tolist()  # what this rank owns of each
        mine = rows[place]
        theirs = torch.cat([row[a:b] for row, a, b in zip(rows, begin, end)]) - place * part
        if self.world.device.type == "cuda":
            mine, theirs = mine.pin_memory(), theirs.pin_memory()
        receives = [b - a for a, b in zip(begin, end)]
        return Touched(mine, at[place].diff().tolist(), theirs, receives)
