"""The log reader on lines as a server writes them."""

import os

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from gemma4.cli import main
from gemma4.pools.usage import read_log
from gemma4.report.results import load

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats


def line(second: int, text: str) -> str:
    return f"[2026-01-31 23:{50 + second // 60}:{second % 60:02d}] {text}\n"


def stats(full: float, swa: float) -> PoolStats:
    return PoolStats(
        full_num_used=int(1000 * full),
        full_token_usage=full,
        full_available_size=0,
        full_evictable_size=0,
        is_hybrid_swa=True,
        swa_num_used=int(1000 * swa),
        swa_token_usage=swa,
    )


def prefill(new: int, full: float, swa: float, running: int, queue: int) -> str:
    usage = ", ".join(stats(full, swa).get_prefill_usage_msg_parts())
    return (
        f"Prefill batch, #new-seq: 1, #new-token: {new}, #cached-token: 0, {usage}, "
        f"#running-req: {running}, #queue-req: {queue}, #pending-token: 0, "
    )


def decode(full: float, swa: float, running: int, queue: int) -> str:
    usage = ", ".join(stats(full, swa).get_decode_usage_msg_parts())
    return f"Decode batch, #running-req: {running}, {usage}, #queue-req: {queue}, "


def test_minutes(tmp_path, capsys):
    log, out = tmp_path / "a.log", tmp_path / "usage.json"
    log.write_text(
        line(0, "Use sliding window memory pool.")
        + line(1, prefill(8192, 0.90, 0.90, 0, 79))  # its warm-up
        + line(1, "Cache flushed successfully!")
        + line(2, prefill(8192, 0.10, 0.50, 0, 79))
        + line(30, prefill(7808, 0.20, 0.75, 1, 78))
        + line(61, decode(0.25, 0.97, 9, 71))
        + line(61, "KV cache pool is full. Retract requests. #retracted_reqs: 3, ")
        + line(100, decode(0.30, 0.40, 6, 74))
        + line(105, 'INFO:     127.0.0.1:4 - "GET /server_info HTTP/1.1" 200 OK')
        + line(106, prefill(8192, 1.0, 1.0, 0, 0))  # the next one's warm-up
        + line(110, "Cache flushed successfully!")  # before another, smaller load
        + line(111, prefill(8192, 1.0, 1.0, 99, 99))
    )
    argv = [str(log), "--json", str(out), "--plot", str(tmp_path)]
    assert main(["pools", "usage", *argv]) == 0
    found = {(r.case["second"], r.arm): r.median for r in load(out).records}
    # The first minute begins with the first batch, at second 2.
    assert found == {
        (0, "full"): 25,
        (0, "SWA"): 97,
        (0, "running"): 9,
        (0, "waiting"): 79,
        (0, "prompts"): 16000,
        (0, "retracted"): 3,
        (60, "full"): 30,
        (60, "SWA"): 40,
        (60, "running"): 6,
        (60, "waiting"): 74,
        (60, "prompts"): 0,
        (60, "retracted"): 0,
    }
    said = capsys.readouterr().out
    assert "16,000 prompt tokens prefilled, 3 requests retracted" in said
    assert (tmp_path / "usage-usage-a.svg").is_file()
    rows = read_log(log, seconds=20)
    assert [row.second for row in rows] == [0, 20, 40, 80]
    assert [row.prefilled for row in rows] == [8192, 7808, 0, 0]


def test_no_swa_pool(tmp_path, capsys):
    log = tmp_path / "plain.log"
    log.write_text(
        line(0, "Decode batch, #running-req: 1, #token: 5, token usage: 0.1")
    )
    assert main(["pools", "usage", str(log)]) == 2
    assert "no line with a SWA token usage" in capsys.readouterr().err
    assert main(["pools", "usage", str(tmp_path / "absent.log")]) == 2
