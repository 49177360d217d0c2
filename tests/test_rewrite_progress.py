"""What a run of days tells of itself."""

from laclip.rewrite.progress import RATE_SECONDS, Progress


def test_rates_and_the_time_left_are_those_of_the_last_minutes():
    progress = Progress(total=10_000, shards=2)
    begin = progress.shown
    progress.earlier({"accepted": 1000, "rejected": {"echo": 1000}})
    for _ in range(100):
        progress.answer(True, 7)
    after = progress.line(begin + 3600)  # an hour of which the server was away for the most part
    assert after.startswith("rewrite: 2,100/10,000 captions, 1/2 shards, 0.0 captions/s, 0 tokens")
    for minute in range(1, 21):
        for _ in range(120):
            progress.answer(True, 10)
        line = progress.line(begin + 3600 + 60 * minute)
    expected = "rewrite: 4,500/10,000 captions, 1/2 shards, 2.0 captions/s, 20 tokens/s"
    assert line == f"{expected}, 77.8% accepted, 0:45:50 left"
    assert len(progress.points) < 2 + RATE_SECONDS / 60 + 1


def test_off_a_terminal_there_is_a_line_a_minute(capfd):
    progress = Progress(total=3, shards=1)
    progress.answer(True, 7)
    assert capfd.readouterr().err == ""
    progress.shown -= 60
    progress.answer(True, 7)
    progress.answer(True, 7)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rewrite: 2/3 captions, 0/1 shards, ") and "\r" not in line
