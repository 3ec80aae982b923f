"""An engine at work for many clients: one thread steps it, everything else is asyncio's.

A Job is what one client asked for. Whoever waits for its text wakes up at its `news` and reads what
its completions have by then, so text that comes faster than a client takes it waits in one place.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from base import InputError, last_resort

from .completion import ids_of
from .metrics import Histogram
from .protocol import ApiError

RETRY_AFTER = 2  # seconds after which a client may try again


class Job:
    """The completions of one request."""

    def __init__(self, completions, deadline):
        """deadline: of time.monotonic()."""
        self.completions = completions
        self.deadline = deadline
        self.begun = time.monotonic()
        self.has_text = False
        self.news = asyncio.Event()
        self.error = None  # an ApiError

    def done(self):
        return all(c.finish_reason is not None for c in self.completions)

    def cancel(self):
        """Nobody waits for it any more."""
        for completion in self.completions:
            completion.cancel()

    def fail(self, error):
        self.error = error
        self.cancel()
        self.news.set()

    def expire(self):
        """Its time is over: what there is has to do."""
        if not any(len(c.tokens) > c.n_prompt for c in self.completions):
            self.fail(busy("the time for this request was over before its turn came"))
            return
        for completion in self.completions:
            completion.cancel("length")
        self.news.set()

    async def wait(self):
        """Wait for news. Raises ApiError."""
        await self.news.wait()
        self.news.clear()
        if self.error:
            raise self.error


class Worker:
    """Steps an engine as long as there are jobs.

    queue: completions that may wait for a place; seconds: that a job may take; thread: an executor
    of one thread that steps it, see one_thread.
    """

    def __init__(self, engine, queue, seconds, thread=None):
        self.engine = engine
        self.queue = queue
        self.seconds = seconds
        self.thread = thread or one_thread()
        self.jobs = {}  # Completion -> Job
        self.wanted = asyncio.Event()
        self.scoring = 0  # calls that wait for the thread
        self.ending = False
        # Since the start
        self.steps = 0
        self.n_read = 0  # tokens of prompts
        self.n_written = 0
        self.first_text = Histogram()

    def submit(self, asked):
        """A Job for what a client asks for, a protocol.Asked. Raises ApiError."""
        if self.ending:
            raise busy("the server is ending")
        engine = self.engine
        free = engine.places - len(engine.live) - len(engine.reading)
        if len(engine.waiting) + len(asked.requests) > self.queue + free:
            raise busy("too many requests are waiting")
        completions = [self.begin(request) for request in asked.requests]
        if not asked.cut:
            for completion in completions:
                self.check_length(completion.n_cut + len(completion.tokens))
        job = Job(completions, time.monotonic() + self.seconds)
        for completion in completions:
            if completion.request.max_tokens == 0:  # only its prompt is of interest
                completion.cancel("length")
                continue
            self.jobs[completion] = job
            self.engine.add(completion)
        self.wanted.set()
        return job

    def go_on(self, job, i, request):
        """Another request in place of a job's i-th completion, which is done."""
        if self.ending or job.error:
            return
        completion = self.begin(request)
        job.completions[i] = completion
        self.jobs[completion] = job
        self.engine.add(completion)
        self.wanted.set()

    def begin(self, request):
        """The engine's Completion. Raises ApiError."""
        try:
            return self.engine.begin(request)
        except InputError as e:  # such as a character that the tokenizer has not seen
            raise ApiError(400, f"prompt: {e}", "prompt") from None

    def ids_of(self, prompt):
        """All token ids of a prompt, end-of-text first. Raises ApiError."""
        try:
            ids = ids_of(prompt, self.engine.tokenizer)
        except InputError as e:
            raise ApiError(400, f"prompt: {e}", "prompt") from None
        self.check_length(len(ids))
        return ids

    def check_length(self, n):
        """Raises ApiError for a prompt of more tokens than the model looks back at."""
        most = self.engine.max_len
        if n > most:
            said = f"prompt: has {n} tokens, and the model looks back at {most}"
            raise ApiError(400, said, "prompt", "context_length_exceeded")

    async def score(self, tokens, alternatives):
        """The engine's, between two steps. Raises ApiError."""
        if self.ending or self.scoring >= self.queue:
            raise busy("too many requests are waiting")
        self.scoring += 1
        try:
            return await self.call(self.engine.score, tokens, alternatives)
        finally:
            self.scoring -= 1

    async def call(self, function, *args):
        """function(*args) in the engine's thread. Raises ApiError for whatever it raises."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)
        except InputError as e:
            raise ApiError(500, str(e), kind="server_error") from None
        except Exception as e:
            raise unexpected(e) from e

    async def run(self):
        """Work until cancelled."""
        while True:
            await self.wanted.wait()
            self.wanted.clear()
            while self.engine.busy():
                try:
                    said = await self.call(self.engine.step)
                except ApiError as e:
                    self.drop_all(e)
                    continue
                self.tell(said)

    def tell(self, said):
        """Wake those who have news, and let go of what is done or late."""
        self.steps += 1
        now = time.monotonic()
        for completion, _ in said:
            job = self.jobs[completion]
            if not job.has_text:
                job.has_text = True
                self.first_text.add(now - job.begun)
            job.news.set()
        for completion, job in list(self.jobs.items()):
            if now > job.deadline and completion.finish_reason is None:
                job.expire()
            if completion.finish_reason is not None:
                del self.jobs[completion]
                self.n_read += completion.n_prompt + completion.redrawn
                self.n_written += completion.n_new

    def drop_all(self, error):
        """The engine failed: all that it was doing is lost, and it begins again."""
        self.engine.clear()
        for job in set(self.jobs.values()):
            job.fail(error)
        self.jobs.clear()

    async def finish(self, seconds, at_once):
        """Take no more jobs, and give those there are so many seconds, or until at_once()."""
        self.ending = True
        until = time.monotonic() + seconds
        while self.jobs and time.monotonic() < until and not at_once():
            await asyncio.sleep(0.05)
        for job in set(self.jobs.values()):
            job.fail(busy("the server is ending"))

    def close(self):
        self.thread.shutdown(wait=False, cancel_futures=True)


def one_thread():
    """An executor for all that computes. A thread that starts PyTorch's loops has helpers of its
    own, which wait for the next loop awake; where two threads have some, there are more of them
    than processors, and OpenMP lets all fall asleep at once: int8 decodes half as fast then."""
    return ThreadPoolExecutor(1)


def busy(why):
    return ApiError(503, f"{why}; try again later", code="overloaded", kind="server_error")


def unexpected(error):
    """An ApiError for what no program expected: its report is kept, and the server goes on."""
    path = last_resort.write_report(error)
    last_resort.show_if_debugging(error)
    last_resort.say(f"error: {last_resort.explain(error)}; the full report is in {path}")
    return ApiError(500, "the server failed; its log says where", kind="server_error")
