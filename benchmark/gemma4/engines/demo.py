"""Serves one model, asks it one question, streams the answer, and stops the server.

python -m gemma4 demo
python -m gemma4 demo --port 30000 --model /models/gemma-4-26B-A4B-it
"""

import json
import sys

from gemma4.engines.host import CACHE
from gemma4.engines.launch import arguments, prepare  # noqa: F401
from gemma4.engines.servers import Server
from gemma4.errors import UserError

QUESTION = "Why is the sky blue?"


def run(args) -> None:
    command, env = prepare(args.port, args.model)
    log = CACHE / f"demo-{args.port}.log"
    server = Server("The server", command, env, args.port, log)
    with server.running(tick=_say_seconds):
        print(
            f"\rThe server is up after {server.seconds:.0f} s.        ", file=sys.stderr
        )
        print(f"> {QUESTION}", flush=True)
        tokens = ask(server)
    if not tokens:
        raise UserError(f"The server answered without a token: see {log}.")
    print(f"{tokens} tokens came back.", file=sys.stderr)
    if not args.model:
        print(
            "(The tiny model's weights are random: MODEL=… serves a real checkpoint.)",
            file=sys.stderr,
        )


def _say_seconds(seconds: float) -> None:
    print(f"\rStarting the server, {seconds:3.0f} s …", end="", file=sys.stderr)


def ask(server: Server) -> int:
    """Prints the answer as it comes, and returns the number of its tokens.

    Raises:
        UserError: The server died, or refused the question.
    """
    asked = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    try:
        with server.ask("/v1/chat/completions", asked, timeout=600) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[len("data: ") :])
                    for choice in chunk.get("choices", ()):
                        print(choice["delta"].get("content") or "", end="", flush=True)
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    except OSError as e:
        server.check_alive("while it answered")
        raise UserError(f"The server did not answer: {e} (see {server.log}).") from None
    print()
    return tokens
