"""./run.sh serve: a run's model for programs that speak OpenAI's protocol, and a page to use it."""

import ipaddress
import os
import socket
import sys

from base import InputError, to_json
from base.command import refuse
from base.options import RATE

from .engine import PLACES
from .options import KNOBS, check, is_taught, make_parser, open_run, say
from .sampling import default_sampling
from .tools import Tools, add_option

KEY = "STOPWATCH_API_KEY"  # in the environment
CONNECTIONS = 512  # at one time
SHUTDOWN = 5  # seconds that running requests have, when the server is ended

DESCRIPTION = """\
Serves the model of a finished run, the newest one or the one that is named, in one process:
OpenAI's /v1/chat/completions, /v1/completions and /v1/models, /health, /metrics for Prometheus,
and at / a page to use it with. A model that was trained on text alone does not answer: it
continues what is written."""

EXAMPLES = f"""\
examples:
  ./run.sh serve
  ./run.sh serve --run runs/a --port 9000 --temperature 0.5
  {KEY}=secret ./run.sh serve --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{{"prompt": "def ", "max_tokens": 50}}'

Options of how tokens are drawn, --tokens and --stop are for requests that do not say. Ctrl-C ends
the server."""


def parse(argv):
    parser = make_parser("serve", DESCRIPTION, EXAMPLES, tokens=256)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    group.add_argument("--port", type=int, default=8000, help="0 is any that is free [8000]")
    group.add_argument(
        "--name", metavar="TEXT", help="what clients call the model [the name of the run's folder]"
    )
    group.add_argument("--api-key", metavar="KEY", help=f"that clients must have [{KEY}'s value]")
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="of web pages that may call, such as https://example.org, besides those of this "
        "machine; * is all",
    )
    add_option(group)
    limits = parser.add_argument_group("what clients get at most")
    limits.add_argument(
        "--places",
        type=int,
        default=PLACES,
        metavar="N",
        help=f"requests that are decoded together [{PLACES}]",
    )
    limits.add_argument(
        "--queue", type=int, default=128, metavar="N", help="requests that wait for a place [128]"
    )
    limits.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="tokens of an answer [4096]"
    )
    limits.add_argument(
        "--max-seconds", type=float, default=300, metavar="S", help="for a request [300]"
    )
    limits.add_argument(
        "--max-body", type=int, default=2**20, metavar="BYTES", help="of a request [1048576]"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, load, serve. Returns the exit status."""
    try:
        args = parse(argv)
        given = check(args)
        check_server(args)
        with listen(args.host, args.port) as listener:
            server = make_server(args, given)
            return serve(server, listener)
    except InputError as e:
        return refuse(e)


def check_server(args):
    """Raises InputError for options that are not valid."""
    for name in "places", "queue", "max_tokens", "max_seconds", "max_body":
        value = getattr(args, name)
        if not RATE[0](value) or value == 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    if args.api_key is None:
        args.api_key = os.environ.get(KEY) or None
    if args.api_key == "":
        raise InputError("--api-key: expected a text, found an empty one")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port {args.port}: expected 0 to 65535")


def listen(host, port):
    """A socket that listens, before a model is loaded. Raises InputError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(
            f"--host {host} --port {port}: {reason}; expected an address of this machine and a "
            "port that no other program has, such as --port 8001"
        ) from None


def make_server(args, given):
    """A Server of the run that the options name. Raises InputError."""
    # Here, so that --help and what is wrong with options do not wait for it
    from .protocol import Served
    from .server import Limits, Server
    from .worker import one_thread

    tools = Tools(args.tools)
    thread = one_thread()
    saved, engine = thread.submit(open_run, args, places=args.places).result()
    if tools and not is_taught(saved):
        raise InputError(f"--tools: {saved.folder} is a base model: expected a taught one")
    sampling = default_sampling(saved.tokenizer, **given)
    served = Served(
        model=args.name or saved.folder.resolve().name,
        taught=is_taught(saved),
        tokenizer=saved.tokenizer,
        max_len=saved.max_len,
        knobs=given,
        stop=tuple(args.stop),
        tokens=min(args.tokens, args.max_tokens),
        most_tokens=args.max_tokens,
        tools=tools or None,
    )
    about = dict(
        kind="chat" if served.taught else "base",  # which continues text
        context_length=saved.max_len,
        end_token=saved.tokenizer.eot,  # what logit_bias calls it
        max_tokens=args.max_tokens,
        defaults=dict(max_tokens=served.tokens, **knobs_of(sampling)),
    )
    limits = Limits(queue=args.queue, seconds=args.max_seconds, body=args.max_body)
    local = is_loopback(args.host)
    if not local and args.api_key is None:
        say(f"note: whoever reaches {args.host} may use this model; --api-key asks for a key")
    origins = tuple(args.allow_origin)
    return Server(engine, served, about, limits, args.api_key, origins, local, thread)


def knobs_of(sampling):
    return {knob.name: getattr(sampling, knob.name) for knob in KNOBS}


def is_loopback(host):
    """Whether an address is for programs of this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(server, listener):
    """Answer until Ctrl-C or SIGTERM. Returns the exit status."""
    import uvicorn

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(
        server.app,
        http="h11",
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,  # after what Ending gives them
    )

    class Ending(uvicorn.Server):
        """Requests that run have a few seconds when it is ended."""

        async def shutdown(self, sockets=None):
            await server.worker.finish(SHUTDOWN, at_once=lambda: self.force_exit)
            await super().shutdown(sockets)

    say(f"serving {server.served.model} at {url}; Ctrl-C ends it")
    print(to_json(dict(url=url, model=server.served.model)), flush=True)
    try:
        Ending(config).run(sockets=[listener])
    except KeyboardInterrupt:  # which it raises again when all is closed
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
