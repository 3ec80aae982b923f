"""What a server makes of many clients at once: their tokens/s together, beside one after another.

    ./run.sh benchmarks serving --run runs/a --clients 32

A server is started as a process of its own on a free port of this machine, and its clients are
threads here, so they share its cores, as those of other machines would not. Each request streams a
continuation of so many tokens, of prompts of several lengths. In each round the same requests are
sent one after another by one client, then by all clients at once. A request that has fewer tokens
than it asked for counts as lost.
"""

import concurrent.futures
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from base import InputError
from base.command import given_path
from benchmarks.options import COUNT
from benchmarks.report import document, number, say, table
from runtime.saved import newest_run

ROOT = Path(__file__).resolve().parents[1]
HEADER = ["", "tokens/s", "server's CPU, ms/token", "first text, s", "its p95", "answer's p95, s"]
PROMPT = "import os\n\ndef "


def add_arguments(parser):
    parser.add_argument("--run", type=given_path, metavar="RUN", help="[the newest in runs/]")
    parser.option("--clients", COUNT, 32, "N", "at once")
    parser.option("--requests", COUNT, 64, "N", "in a round")
    parser.option("--tokens", COUNT, 64, "N", "of each answer")
    parser.option("--repeats", COUNT, 3, "N", "rounds, for medians")


def run(run=None, clients=32, requests=64, tokens=64, repeats=3):
    """dict of the rounds, their medians, and what the server's process held of memory."""
    folder = run or newest_run()
    with Served(folder, clients) as server:
        say(f"serving {folder} at {server.url}")
        bodies = [body_of(i, tokens, server.end_token) for i in range(requests)]
        in_turn = bodies[: max(1, requests // 4)]
        send_all(server, in_turn[:2], 1)  # the first ones are slower
        memory = [server.resident()]
        rounds = []
        for i in range(repeats):
            alone = send_all(server, in_turn, 1)
            together = send_all(server, bodies, clients)
            ratio = together["tokens_per_s"] / alone["tokens_per_s"]
            say(
                f"round {i + 1}: {alone['tokens_per_s']:.0f} tokens/s one after another, "
                f"{together['tokens_per_s']:.0f} by {clients} clients: {ratio:.2f} times"
            )
            rounds.append(dict(alone=alone, together=together, ratio=ratio))
            memory.append(server.resident())
    return dict(
        run=str(folder),
        clients=clients,
        requests=requests,
        tokens=tokens,
        rounds=rounds,
        ratio=statistics.median(r["ratio"] for r in rounds),
        lost=sum(r[kind]["lost"] for r in rounds for kind in ("alone", "together")),
        resident_mb=memory,
    )


def body_of(i, tokens, eot):
    """A request: prompts of several lengths, an answer that does not end early."""
    return dict(
        prompt=PROMPT * (1 + i % 8),
        max_tokens=tokens,
        seed=i,
        stream=True,
        stream_options=dict(include_usage=True),
        logit_bias={str(eot): -100},
    )


class Served:
    """A server of a run, as a process. Use as a context manager."""

    def __init__(self, folder, places):
        argv = ["serve", "--run", folder, "--port", 0, "--places", places, "--queue", 10_000]
        self.command = [sys.executable, ROOT / "door.py", *argv]

    def __enter__(self):
        self.process = subprocess.Popen(
            [*map(str, self.command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip()
            raise InputError(f"the server did not start: {said[-300:]}")
        self.url = json.loads(line)["url"]
        self.port = urlsplit(self.url).port
        self.end_token = self.get("/v1/models")["data"][0]["end_token"]
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stderr.close()
        self.process.stdout.close()

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    def resident(self):
        """Megabytes of memory, None where the system does not say."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except OSError:
            return None
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_seconds(self):
        """That its process has used so far, None where the system does not say."""
        try:
            said = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return None
        return (int(said[11]) + int(said[12])) / os.sysconf("SC_CLK_TCK")


def send(port, body):
    """(tokens written, seconds to the first text, seconds in all) of one request."""
    started = time.perf_counter()
    first = None
    usage = {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body))
    with connection.getresponse() as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            if first is None:
                first = time.perf_counter() - started
            if b'"prompt_tokens"' in line:
                usage = json.loads(line[6:]).get("usage") or {}
    connection.close()
    return usage.get("completion_tokens", 0), first, time.perf_counter() - started


def send_all(server, bodies, clients):
    """Send the requests by so many clients; what came of it."""
    started = time.perf_counter()
    used = server.cpu_seconds()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: send(server.port, body), bodies))
    seconds = time.perf_counter() - started
    if used is not None:
        used = server.cpu_seconds() - used
    n = sum(tokens for tokens, _, _ in answers)
    lost = sum(got < body["max_tokens"] for (got, _, _), body in zip(answers, bodies))
    firsts = sorted(first or seconds for _, first, _ in answers)
    whole = sorted(whole for _, _, whole in answers)
    return dict(
        requests=len(bodies),
        lost=lost,
        seconds=seconds,
        tokens_per_s=n / seconds,
        server_cpu_ms_per_token=used and 1e3 * used / max(1, n),
        first_text_s=dict(median=at(firsts, 0.5), p95=at(firsts, 0.95)),
        answer_s=dict(median=at(whole, 0.5), p95=at(whole, 0.95)),
    )


def at(ordered, share):
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def cpu_of(parts):
    times = [p["server_cpu_ms_per_token"] for p in parts]
    return None if None in times else statistics.median(times)


def render(result):
    """The result in Markdown."""
    rows = []
    for kind, label in [("alone", "one after another"), ("together", "at once")]:
        parts = [r[kind] for r in result["rounds"]]
        rows.append(
            [
                label,
                f"{statistics.median(p['tokens_per_s'] for p in parts):,.0f}",
                number(cpu_of(parts), ".2f"),
                f"{statistics.median(p['first_text_s']['median'] for p in parts):.3f}",
                f"{statistics.median(p['first_text_s']['p95'] for p in parts):.3f}",
                f"{statistics.median(p['answer_s']['p95'] for p in parts):.2f}",
            ]
        )
    memory = [m for m in result["resident_mb"] if m is not None] or [0]
    return document(
        "# Serving",
        f"{result['clients']} clients, {result['requests']} requests of {result['tokens']} tokens "
        f"each in a round: {result['ratio']:.2f} times the tokens/s of one after another (median "
        f"of {len(result['rounds'])} rounds), {result['lost']} requests lost; the server held "
        f"{memory[0]:,.0f} MB at first and {memory[-1]:,.0f} MB at the end.",
        table(
            [
                "",
                "tokens/s",
                "server's CPU, ms/token",
                "first text, s",
                "its p95",
                "answer's p95, s",
            ],
            rows,
        ),
    )
