"""The optimizer: every parameter by its rule, shared out over the ranks of each machine."""

import torch
import torch.distributed as dist

from kernels.clear import clear_unless

from .gradients import gradient_report
from .masters import new_companion
from .rule import Turn
from .shards import Shard, make_room


class Optimizer:
    """Updates parameters by their rules.

    Each gradient is reduced to parts, a part's owner updates it, the weights are gathered; all of
    it overlaps between parameters. The guard looks at the parts, when all of them are there. A part
    is what the rule's parts() shares out: elements, rows of a table or whole matrices. For bf16
    weights the owner keeps what makes them exact fp32 masters.

    rules: {parameter name: Rule} for all parameters of the model, in the order of updates. Small
    ones should come first and long updates last, so that they hide the others' gathers.
    """

    def __init__(self, model, rules, world, compile=False, skips=False, clip=0.0, fused=None):
        """world: a World; skips: whether a run goes on after steps that do not count; clip: the
        longest gradient over all parameters that an update sees, 0 for any; fused: what has
        pointwise functions in C, under their names, or None."""
        self.params = dict(model.named_parameters())
        assert rules.keys() == self.params.keys(), "the rules must name every parameter"
        # Parts of a model that are switched off have no elements
        self.rules = {name: rule for name, rule in rules.items() if self.params[name].numel()}
        self.world = world
        self.compile = compile
        self.skips = skips
        self.clip = clip
        self.fused = fused
        self.compiled = {}  # function -> the same, compiled
        self.rooms = {}  # parameter name -> its elements and zeros, where ranks do not divide it
        for name, rule in self.rules.items():
            if rule.sharded and world.local_size > 1:
                p = self.params[name]
                room = make_room(p, len(rule.parts(p.data)), world)
                if room is not None:
                    self.rooms[name] = room
        self.reset()

    def padding_rows(self):
        """{parameter name: rows of padding behind its own}, where ranks do not divide them."""
        found = {}
        for name in self.rooms:
            shard = self.shards[name]
            found[name] = shard.n * shard.ranks - len(shard.whole)
        return found

    def fast(self, f):
        """A pointwise function, compiled where the run compiles, or in C.

        On a CPU one compiled function on flat tensors serves every parameter; on a GPU there is one
        for each size, since Inductor vectorises loads where it knows the size.
        """
        if not self.compile:
            return getattr(self.fused, f.__name__, f)
        if f not in self.compiled:
            dynamic = not next(iter(self.params.values())).is_cuda
            self.compiled[f] = torch.compile(f, fullgraph=True, dynamic=dynamic)
        return self.compiled[f]

    def scalar(self, x):
        """A hyperparameter: compiled code takes a 0-d tensor, for which a new value compiles
        nothing."""
        return torch.tensor(x, dtype=torch.float32) if self.compile else float(x)

    @torch.no_grad()
    def reset(self):
        """Moments at zero, nothing below the weights' last bit, no gradients."""
        self.shards = {}
        self.state = {}  # parameter name -> {"companion": ..., and the rule's moments}
        self.fixed = {}  # parameter name -> what its rule needs to know of the rows owned
        self.step_count = 0
        self.reduced = None  # {parameter name: (work or None, part)} between gradients() and step()
        self.prepared = {}  # parameter name -> what its rule has done already
        for name, rule in self.rules.items():
            whole = rule.parts(self.params[name].data)
            room = self.rooms.get(name)
            if room is not None:
                room = room.view(-1, *whole.shape[1:])
            shard = Shard(whole, self.world, rule.sharded, room)
            self.shards[name] = shard
            self.state[name] = dict(companion=new_companion(shard.own), **rule.new_state(shard.own))
            self.fixed[name] = rule.fixed(shard.own, shard.start)
            self.params[name].grad = None

    @torch.no_grad()
    def gradients(self, momentum=None, touched=()):
        """{parameter: gradient summed over ranks, of the rows that this rank owns, or None}, the
        same names on all ranks: what the guard judges before step().

        Gradients that wait for a later turn are judged then; in a single process now, where nothing
        has to be summed. With the momentum of step(), what updates can do before anyone knows
        whether they count is done while other sums are still on their way. touched: {table: the
        Touched of all steps since its last turn}; of others all rows are summed.
        """
        self.reduce(touched)
        found = dict.fromkeys(self.rules)
        if self.world.size == 1:
            return found | {name: self.params[name].grad for name in self.rules}
        for name, (work, part) in self.reduced.items():
            if work is not None:
                work.wait()
            self.reduced[name] = None, part
            if momentum is not None and self.rules[name].prepares:
                self.prepare(name, part, momentum)
            found[name] = self.owned(name, part)
        return found

    @torch.no_grad()
    def reduce(self, touched=()):
        """Start all sums over ranks that the next step needs: first inside each machine, then
        across machines. What is long to update comes first."""
        if self.reduced is not None:
            return
        names = []
        for name in self.waiting():
            if (self.step_count + 1) % self.rules[name].every == 0:
                names.append(name)
        names.sort(key=lambda name: not self.rules[name].prepares)
        self.reduced = {}
        for name in names:
            shard, grad = self.shards[name], self.params[name].grad
            if name in touched:
                self.reduced[name] = shard.reduce_rows(grad, touched[name].to(grad.device))
            else:
                self.reduced[name] = shard.reduce(grad)
        for name in names:
            self.reduced[name] = self.shards[name].reduce_across(*self.reduced[name])

    @torch.no_grad()
    def step(self, lr_scale, momentum, ok=None):
        """One update from .grad, summed over micro-batches; it is summed over ranks here, or has
        been for gradients().

        Clears .grad of what it updates. ok: None, or a 0-d bool tensor on the device: where it is
        False, weights and moments stay as they are.
        """
        on_gpu = ok is not None and ok.device.type != "cpu"
        if ok is not None and not on_gpu:
            # Known already, and checks in every pass would cost 5% of the step
            if not ok:
                self.drop_gradients()
            ok = None

        self.reduce()
        reduced = self.reduced
        self.reduced = None
        self.step_count += 1
        if self.clip:
            self.shorten(reduced)

        gathers = []
        for (
            name
        ) in self.rules:  # not in the order of the sums: long updates hide the others' gathers
            if name not in reduced:
                continue
            work, grad = reduced[name]
            if work is not None:
                work.wait()
            self.update(name, grad, lr_scale, momentum, ok)
            gathers.append(self.shards[name].gather())
            self.params[name].grad = None
        for finish in gathers:
            finish()

        # What waits for its turn is part of a later sum, unless this step does not count
        if on_gpu and self.skips:
            for name in self.waiting():
                clear_unless(self.params[name].grad, ok)

    def prepare(self, name, grad, momentum):
        """What the rule can do for the rows that this rank owns without writing anything."""
        if len(self.shards[name].own):
            turn = self.turn(name, 1.0, momentum, None)
            grad = self.owned(name, grad).data
            self.prepared[name] = self.rules[name].prepare(grad, self.state[name], turn)

    def owned(self, name, part):
        """Of a summed gradient, the rows that this rank owns; behind them nothing counts."""
        return part[: len(self.shards[name].own)]

    def turn(self, name, lr_scale, momentum, ok):
        count = self.step_count // self.rules[name].every
        return Turn(lr_scale, momentum, count, ok, self.scalar, self.fast, self.fixed[name])

    def update(self, name, grad, lr_scale, momentum, ok):
        """Update the rows of one parameter that this rank owns; grad is padded to equal parts."""
        own = self.shards[name].own
        if not len(own):
            return
        turn = self.turn(name, lr_scale, momentum, ok)
        if name in self.prepared:
            turn = turn._replace(prepared=self.prepared.pop(name))
        state = self.state[name]
        # .data: compiled code would look at what a view is a view of
        grad = self.owned(name, grad).data
        self.rules[name].update(own.data, state["companion"], grad, state, turn)

    def shorten(self, reduced):
        """Scale all of these gradients so that together they are no longer than `clip`, in place.

        reduced: {name: (work or None, this rank's part)}; waits for all of them.
        """
        whole = []  # the same on all ranks
        parts = []  # of this rank, the others of its machine have the rest
        for name, (work, grad) in reduced.items():
            if work is not None:
                work.wait()
                reduced[name] = None, grad
            found = parts if self.shards[name].ranks > 1 else whole
            found.append(self.owned(name, grad))
        square = torch.zeros((), device=self.world.device)
        if parts:
            square = gradient_report(parts).sum()
            dist.all_reduce(square, group=self.world.node)
        if whole:
            square = square + gradient_report(whole).sum()
        scale = (self.clip / square.sqrt()).clamp(max=1.0)  # of no gradient at all: inf, so 1
        for grad in parts + whole:
            grad.mul_(scale)

    def waiting(self):
        """Names of parameters that have a gradient: between steps, those that wait for a turn."""
        return [name for name in self.rules if self.params[name].grad is not None]

    def is_settled(self):
        """Whether no gradient waits for a later step: then a checkpoint holds everything."""
        return not self.waiting()

    def drop_gradients(self):
        self.reduced = None
        self.prepared = {}
        for name in self.waiting():
            self.params[name].grad = None

    @torch.no_grad()
    def copy(self, successors):
        """{parameter: another one}: it gets the other's weights, moments and waiting gradient, as
        copies."""
        for target, source in successors.items():
            self.params[target].data.copy_(self.params[source].data)
            for key, x in self.state[source].items():
                if x is not None:
                    self.state[target][key].copy_(x)
            grad = self.params[source].grad
            if grad is not None:
                self.params[target].grad = grad.clone()
