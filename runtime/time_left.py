"""How long a run has still to go, counted in the work of the steps to come."""


class TimeLeft:
    """Seconds that the remaining steps will take.

    A step takes what steps of its stage have taken so far. Of a stage that has not come yet, the
    forward and backward passes were timed beforehand; what a step has besides (the update, the
    loop) does not depend on its batch, and the steps taken so far show how much that is.

    stages: {step: its stage}; passes: {stage: seconds of a step's passes}, may lack stages.
    """

    def __init__(self, stages, passes):
        self.stages = stages
        self.passes = passes
        self.to_come = {}  # stage -> number of steps
        for stage in stages.values():
            self.to_come[stage] = self.to_come.get(stage, 0) + 1
        self.first = {}  # stage -> seconds of its first step here, which sets things up
        self.taken = {}  # stage -> (steps, seconds) of the others

    def forget(self, step):
        """Steps up to this one are done, whenever that was: a run goes on from there."""
        for s in range(1, step + 1):
            self.to_come[self.stages[s]] -= 1

    def add(self, step, seconds):
        """A step was taken and took so long."""
        stage = self.stages[step]
        self.to_come[stage] -= 1
        if stage not in self.first:
            self.first[stage] = seconds
            return
        count, total = self.taken.get(stage, (0, 0.0))
        self.taken[stage] = (count + 1, total + seconds)

    def seconds(self):
        """Seconds that all steps to come will take; 0.0 before the first step."""
        left = 0.0
        for stage, steps in self.to_come.items():
            if steps:
                left += steps * self.of_one(stage)
        return left

    def of_one(self, stage):
        """Seconds of one step of a stage."""
        means = {other: total / count for other, (count, total) in self.taken.items()}
        means = means or self.first  # better than nothing
        if stage in means or not means:
            return means.get(stage, 0.0)
        seen = sorted((self.passes[s], mean) for s, mean in means.items() if s in self.passes)
        if stage not in self.passes or not seen:
            return self.first.get(stage, sum(means.values()) / len(means))

        expected = self.passes[stage]
        least, took_least = seen[0]
        most, took_most = seen[-1]
        if most > 1.5 * least:
            # Far enough apart to tell how wrong the timing was from what a step has besides
            slope = min(2.0, max(0.5, (took_most - took_least) / (most - least)))
            return max(slope * expected, took_most + slope * (expected - most))
        besides = took_most - most
        if besides < 0:  # timed too long
            return expected * took_most / most
        return expected + besides
