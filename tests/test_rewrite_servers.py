"""Servers that are slow, limit, fail, lie or die: nothing lost, nothing doubled, all counted."""

import contextlib
import json
import threading
import time
from collections import Counter
from itertools import count

import loopback
import pytest

from laclip.cli import main
from laclip.rewrite.engine import Request, Sampling
from laclip.rewrite.prompts import load_prompts
from laclip.rewrite.servers import Servers

KEY = "sk-secret-0123456789"


class Handler(loopback.Handler):
    """Answers `rewritten CAPTION`; the server's `fault(n)` spoils its n-th request."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = "messages" in body
        shown = body["messages"][-1]["content"] if chat else body["prompt"].split("\n")[-1]
        caption = shown.removesuffix(" =>")
        self.server.bodies.append(body)
        self.server.keys.add(self.headers.get("Authorization"))
        fault = self.server.fault(next(self.server.numbers), caption)
        if fault == "close":
            self.close_connection = True
            return
        text = f"rewritten {caption}"
        choice = {"message": {"content": text}} if chat else {"text": f" {text}\nnext =>"}
        answer = {"choices": [choice], "usage": {"completion_tokens": 5}}
        status, data = 200, json.dumps(answer).encode()
        if isinstance(fault, int):
            said = self.headers.get("Authorization")
            status, data = fault, json.dumps({"error": f"no, {said}"}).encode()
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        elif isinstance(fault, bytes):
            data = fault
        elif fault == "slow":  # slower than the client is patient: it hangs up
            assert not self.rfile.read(1)
            self.close_connection = True
            return
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0.1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve():
    """serve(fault) starts a server on loopback; its `url` and what it was asked."""
    with contextlib.ExitStack() as servers:

        def start(fault=lambda number, caption: None):
            own = {"fault": fault, "numbers": count(), "bodies": [], "keys": set()}
            return servers.enter_context(loopback.serving(Handler, **own))

        yield start


def requests(number):
    prompts = load_prompts("plain")
    for i in range(number):
        yield Request(None, i, f"k{i}", f"caption number {i}", *prompts.draw(f"k{i}", 0))


def engine(*urls, chat=False, in_flight=8, timeout_seconds=60.0):
    return Servers(
        list(urls),
        "a-model",
        Sampling(load_prompts("plain"), chat),
        in_flight=in_flight,
        timeout_seconds=timeout_seconds,
        first_pause_seconds=0.01,
    )


def assert_each_answered_once(answers, number):
    assert Counter(request.number for request, _ in answers) == Counter(range(number))
    for request, answer in answers:
        assert answer.text.strip() == f"rewritten {request.caption}" and not answer.failed


@pytest.mark.parametrize("chat", [False, True])
def test_requests_carry_the_prompt_and_the_papers_sampling(chat, serve):
    server = serve()
    answers = list(engine(server.url, chat=chat).answers(requests(20)))
    assert_each_answered_once(answers, 20)
    asked = {request.caption: request for request, _ in answers}
    for body in server.bodies:
        prompt = body.pop("messages") if chat else body.pop("prompt")
        last = prompt[-1]["content"] if chat else prompt.split("\n")[-1].removesuffix(" =>")
        expected = {"model": "a-model", "temperature": 0.9, "top_p": 0.95, "max_tokens": 77}
        expected |= {"seed": asked[last].seed} | ({} if chat else {"stop": ["\n"]})
        assert body == expected
    assert server.keys == {None}


ABORTED = b'{"choices": [{"text": " rewr", "finish_reason": "abort"}]}'
FAULTS = [
    "close",
    "cut",
    "slow",
    429,
    500,
    503,
    b"",
    b"nonsense",
    b"[]",
    b'{"choices": []}',
    ABORTED,
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_now_and_then_costs_no_caption_and_doubles_none(fault, serve):
    every = 20 if fault == "slow" else 3
    server = serve(lambda number, caption: fault if number % every == 1 else None)
    patience = 1.0 if fault == "slow" else 60.0
    answers = list(engine(server.url, timeout_seconds=patience).answers(requests(60)))
    assert_each_answered_once(answers, 60)


def test_all_servers_take_part_and_a_dead_one_is_done_without(serve):
    asked = threading.Event(), threading.Event()

    def after(other):  # each of the two answers once the other is asked, too
        def fault(number, caption):
            asked[1 - other].set()
            assert asked[other].wait(300)

        return serve(fault)

    first, second, dead = after(1), after(0), serve()
    dead.shutdown()
    dead.server_close()
    urls = (first.url, dead.url, second.url)
    assert_each_answered_once(list(engine(*urls, in_flight=2).answers(requests(200))), 200)
    assert first.bodies and second.bodies


def test_many_requests_are_in_flight_at_once(serve):
    barrier = threading.Barrier(16)  # the server answers once 16 requests are there together

    def fault(number, caption):
        barrier.wait(300)

    answers = list(engine(serve(fault).url, in_flight=16).answers(requests(64)))
    assert_each_answered_once(answers, 64)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_server_that_refuses_everything_ends_the_run_with_its_words(status, serve):
    with pytest.raises(ValueError, match=f"/completions: {status} .*no, "):
        list(engine(serve(lambda number, caption: status).url).answers(requests(100)))


def test_failures_are_told_once_in_a_while(serve, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("laclip.rewrite.servers.TOLD_SECONDS", 3600.0)  # none passes meanwhile
    server = serve(lambda number, caption: 503 if number % 3 == 1 else None)
    assert_each_answered_once(list(engine(server.url).answers(requests(60))), 60)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "trying again after a failure" in line]
    assert f"{server.url}: 503" in line and KEY not in said


def test_failures_after_the_run_has_ended_are_not_told(serve, capsys):
    ended = threading.Event()

    def fault(number, caption):
        if number:
            ended.wait(300)
        return 503 if number else 401

    before = set(threading.enumerate())
    server = serve(fault)
    with pytest.raises(ValueError, match="401"):
        list(engine(server.url, in_flight=4).answers(requests(8)))
    ended.set()
    for thread in set(threading.enumerate()) - before:
        if thread.name.endswith("(_work)"):
            thread.join(300)
            assert not thread.is_alive()
    assert "trying again" not in capsys.readouterr().err


def test_a_request_waits_before_it_is_tried_again_however_idle_the_client_is(serve):
    ill_until = time.monotonic() + 0.5  # of 8 tries without a pause none would be left
    server = serve(lambda number, caption: 503 if time.monotonic() < ill_until else None)
    assert_each_answered_once(list(engine(server.url, in_flight=16).answers(requests(1))), 1)
    assert len(server.bodies) <= 8


def test_when_no_server_answers_any_more_the_run_ends(serve):
    with pytest.raises(ValueError, match="no server answers any more"):
        list(engine(serve(lambda n, caption: 500).url, in_flight=2).answers(requests(1000)))


def test_a_caption_that_the_server_refuses_is_an_answer(serve):
    server = serve(lambda number, caption: 400 if caption.endswith(" 7") else None)
    answers = list(engine(server.url, in_flight=1).answers(requests(10)))
    assert [r.number for r, answer in answers if answer.refused] == [7]
    assert len(answers) == 10


def test_what_a_content_filter_took_away_is_no_rewrite(serve):
    taken = b'{"choices": [{"text": " rewr", "finish_reason": "content_filter"}]}'
    server = serve(lambda number, caption: taken if caption.endswith(" 7") else None)
    answers = list(engine(server.url, in_flight=1).answers(requests(10)))
    assert [r.number for r, answer in answers if answer.refused] == [7]


def test_a_caption_that_the_server_refuses_is_an_answer_though_it_is_the_only_one_left(serve):
    server = serve(lambda number, caption: 400 if caption == "caption number 0" else None)
    ((request, answer),) = engine(server.url, in_flight=1).answers(requests(1))
    assert request.number == 0 and answer.refused and "no, " in answer.text


@pytest.mark.parametrize("fault", [400, 401, 403, 404, 500, "close"])
def test_while_a_server_takes_nothing_no_caption_is_at_fault(fault, serve, monkeypatch):
    """As a hosted one whose credit is used up, or a load balancer whose servers start again."""
    monkeypatch.setattr("laclip.rewrite.servers.LONGEST_PAUSE_SECONDS", 0.01)
    server = serve(lambda number, caption: fault if 20 <= number < 320 else None)
    assert_each_answered_once(list(engine(server.url, in_flight=4).answers(requests(60))), 60)


def test_a_server_that_answered_once_is_not_waited_for_for_ever(serve, monkeypatch):
    monkeypatch.setattr("laclip.rewrite.servers.OUTAGE_SECONDS", 0.1)
    server = serve(lambda number, caption: 400 if number >= 20 else None)
    with pytest.raises(ValueError, match="no server answers any more. Last: .* 400 "):
        list(engine(server.url, in_flight=4).answers(requests(60)))


def test_a_limit_sets_no_caption_aside(serve, monkeypatch):
    monkeypatch.setattr("laclip.rewrite.servers.LONGEST_PAUSE_SECONDS", 0.01)
    asked: Counter = Counter()

    def fault(number, caption):
        asked[caption] += 1
        return 429 if asked[caption] <= 20 and not caption.endswith(" 0") else None

    answers = list(engine(serve(fault).url, in_flight=4).answers(requests(5)))
    assert_each_answered_once(answers, 5)


def test_a_caption_that_alone_is_limited_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("laclip.rewrite.servers.OUTAGE_SECONDS", 4.0)
    monkeypatch.setattr("laclip.rewrite.servers.LONGEST_PAUSE_SECONDS", 0.01)
    server = serve(lambda number, caption: 429 if caption == "caption number 7" else None)
    answers = list(engine(server.url, in_flight=4).answers(requests(10)))
    assert [request.number for request, answer in answers if answer.failed] == [7]
    assert len(answers) == 10


def test_an_engine_takes_one_shard_after_another(serve):
    server = serve()
    shared, done = engine(server.url), []

    def work():
        for _ in range(20):
            answers = list(shared.answers(requests(5)))
            assert_each_answered_once(answers, 5)
            done.append(len(answers))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(120)
    assert done == 20 * [5]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://me:pass@host/v1"])
def test_unfit_address_is_refused(url):
    with pytest.raises(ValueError, match="--server") as raised:
        engine(url)
    assert "pass@" not in str(raised.value)


def command(captions, out, server, *more):
    words = ["rewrite", captions, out, "--server", server.url, "--model", "m", *more]
    return main(list(map(str, words)))


def test_the_key_reaches_the_server_and_no_file_or_message(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "a.txt").write_text("a red door\nan odd door\na blue door\n")
    # The server repeats the key in its errors.
    server = serve(lambda number, caption: 400 if "odd" in caption and number > 1 else None)
    assert command(tmp_path / "a.txt", tmp_path / "out", server, "--in-flight", 1) == 0
    refusing = serve(lambda number, caption: 401)
    assert command(tmp_path / "a.txt", tmp_path / "out2", refusing) == 2
    assert server.keys == {f"Bearer {KEY}"}
    printed = capsys.readouterr()
    assert "[OPENAI_API_KEY]" in printed.err
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(KEY in text for text in [*files, *printed])


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\n{KEY}", f"{KEY} {KEY}", f"{KEY}—"])
def test_a_key_that_no_header_can_hold_is_not_shown(key, serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    (tmp_path / "a.txt").write_text("a red door\n")
    server = serve()
    fine = key.strip() == KEY  # as `$(cat FILE)` or an editor leaves it
    assert command(tmp_path / "a.txt", tmp_path / "out", server) == (0 if fine else 2)
    assert server.keys == ({f"Bearer {KEY}"} if fine else set())
    printed = capsys.readouterr()
    assert KEY not in printed.err + printed.out and ("OPENAI_API_KEY" in printed.err) != fine


def test_a_run_that_got_no_answer_gives_way_to_a_corrected_command(serve, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red door\n")
    out, wrong = tmp_path / "out", serve(lambda number, caption: 404)
    assert command(tmp_path / "a.txt", out, wrong, "--model", "mistyped") == 2
    assert command(tmp_path / "a.txt", out, serve()) == 0
    assert command(tmp_path / "a.txt", out, serve(), "--seed", 1) == 2  # there is something now
    assert "holds another run" in capsys.readouterr().err


def test_a_shard_that_keeps_failing_is_set_aside_and_finished_later(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("laclip.rewrite.servers.TRIES", 2)
    monkeypatch.setattr("laclip.rewrite.servers.LONGEST_PAUSE_SECONDS", 0.01)
    folder = tmp_path / "captions"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text("".join(f"{name} door {i}\n" for i in range(5)))
    out = tmp_path / "out"
    ill = [True]
    server = serve(lambda number, caption: 500 if ill[0] and caption == "b door 3" else None)
    assert command(folder, out, server) == 1
    (problem,) = json.loads((out / "set_aside.json").read_text())
    assert problem["shard"] == "b" and problem["problem"].startswith("key 3: ")
    assert len((out / "rewrites.jsonl").read_text().splitlines()) == 10
    asked = len(server.bodies)
    ill[0] = False
    assert command(folder, out, server) == 0
    assert len(server.bodies) == asked + 1  # the one caption that was missing
    texts = [json.loads(line)["text"] for line in (out / "rewrites.jsonl").open()]
    assert texts == [f"rewritten {name} door {i}" for name in "abc" for i in range(5)]
    assert json.loads((out / "set_aside.json").read_text()) == []


def test_an_unreadable_shard_is_set_aside_and_the_others_are_done(serve, tmp_path, capsys):
    folder = tmp_path / "captions"
    folder.mkdir()
    (folder / "a.txt").write_text("a red door\n")
    (folder / "b.txt").write_bytes(b"a blue door\ncaf\xe9\n")
    (folder / "c.txt").write_bytes(b"\xff\n")
    (tmp_path / "out").write_text("")
    assert command(folder, tmp_path / "out", serve()) == 2
    assert "expected a folder for the run" in capsys.readouterr().err
    (tmp_path / "out").unlink()
    assert command(folder, tmp_path / "out", serve()) == 1
    printed = capsys.readouterr().out
    assert "set aside: b: " in printed and "set aside: c: " in printed
    assert printed.count("not UTF-8") == 2
    assert len((tmp_path / "out" / "rewrites.jsonl").read_text().splitlines()) == 1
