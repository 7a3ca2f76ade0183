"""`start` on the CPU: a server starts as a user starts it, and answers."""

from gemma4.cli import main
from gemma4.report import results
from gemma4.serve.start import REQUESTS


def test_first_requests(tmp_path, capsys, refused):
    place = ["--out", str(tmp_path), "--logs", str(tmp_path), "--port", "31380"]
    small = ["--shape", "tiny", "--tokens", "40", "200", "--repeats", "1"]
    assert main(["start", "--arms", "fork", "--cold", *small, *place]) == 0
    found = results.load(tmp_path / "start.json")
    for tokens in (40, 200):
        for which in REQUESTS:
            case = {"tokens": tokens, "request": which}
            (sample,) = found.get(case, "fork", "time of a request").samples
            assert sample > 0
    (seconds,) = found.get({"load": "start"}, "fork", "start-up").samples
    assert seconds > 0
    assert "200, first" in capsys.readouterr().out
    log = (tmp_path / "start-fork.server.log").read_text()
    # It answered the request that it sends itself, before the first of ours.
    own, _, ours = log.partition('"POST /generate')
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in own and ours

    assert "start.json exists" in refused("start", *small, *place)
