"""The engine `openai`: any number of servers that speak OpenAI's protocol, many requests at once.

vLLM, SGLang, TGI, llama.cpp, Ollama, `transformers serve`, hosted ones: POST /v1/completions, or
/v1/chat/completions with --chat.
"""

import http.client
import json
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from laclip.rewrite.engine import Answer, Request, Sampling, first_line

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 8  # of one request, over all servers
LONGEST_PAUSE_SECONDS = 60.0
OUTAGE_SECONDS = 1800.0  # that a run waits for servers which answered before
TOLD_SECONDS = 30.0  # between two lines about failures
_REFUSED = (400, 403, 413, 422)  # fault of the request, if the server takes another one
_UNFIT = (301, 302, 307, 308, 401, 404, 405)  # fault of the command, if it never was otherwise


class Servers:
    """Sends requests to servers and gives the answers as they come."""

    def __init__(
        self,
        urls: list[str],
        model: str,
        sampling: Sampling,
        *,
        in_flight: int = 64,
        timeout_seconds: float = 300.0,
        first_pause_seconds: float = 1.0,
    ):
        """urls: such as http://host:8000/v1. in_flight: requests at a time to each of them."""
        self.urls = [_checked(url) for url in urls]
        self.model, self.sampling = model, sampling
        self.in_flight, self.timeout_seconds = in_flight, timeout_seconds
        self.first_pause_seconds = first_pause_seconds
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise ValueError(f"{KEY_VARIABLE}: expected one word of ASCII characters")
        self._waiting: deque[Request] = deque()
        # When to try again, and by another server than which.
        self._later: list[tuple[float, str, Request]] = []
        self._wake = threading.Condition()
        self._results: queue.SimpleQueue | None = None  # of the call of answers() that is at work
        self._answered: set[str] = set()  # servers that did so once
        self._answered_at = 0.0
        self._failures = 0  # since the last answer
        self._told = -TOLD_SECONDS

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        """Every request with its answer, in the order in which answers come.

        A request that fails is tried again, by whichever server is free. It is given up when it
        was refused, failed TRIES times (limits apart) or is the only one that fails for long,
        though the server had just answered another one: while that fails, too, nothing is the
        request's fault. Raises ValueError when a server refuses everything from the start, and
        when none answers any more.
        """
        results: queue.SimpleQueue = queue.SimpleQueue()
        with self._wake:
            self._results, self._failures = results, 0
            self._answered_at = time.monotonic()
        for number in range(self.in_flight * len(self.urls)):
            url = self.urls[number % len(self.urls)]
            threading.Thread(target=self._work, args=(url, results), daemon=True).start()
        under_way, more = 0, True
        try:
            while more or under_way:
                while more and under_way < 2 * self.in_flight * len(self.urls):
                    request = next(requests, None)
                    if request is None:
                        more = False
                        break
                    under_way += 1
                    with self._wake:
                        self._waiting.append(request)
                        self._wake.notify()
                if not under_way:
                    break
                item = results.get()
                if isinstance(item, BaseException):
                    raise item
                under_way -= 1
                yield item
        finally:
            with self._wake:
                self._results = None
                self._waiting.clear()
                self._later.clear()
                self._wake.notify_all()

    def _work(self, url: str, results: queue.SimpleQueue) -> None:
        """One thread, one connection: takes requests until the call that started it has ended."""
        connection = None
        pause = 0.0
        while True:
            with self._wake:
                if pause:
                    self._wake.wait_for(lambda: self._results is not results, timeout=pause)
                request = self._next(url, results)
            if request is None:
                break
            last, still = False, self._still(OUTAGE_SECONDS / 2)
            try:
                last = (still or request.tries >= TRIES - 1) and self._takes_another(url, request)
                connection = connection or self._connect(url)
                answer = self._ask(connection, url, request)
            except _Unusable as error:
                results.put(ValueError(self._hidden(str(error))))
                break
            except (OSError, http.client.HTTPException, _Failure) as error:
                if connection is not None:
                    connection.close()
                connection = None
                pause = min(max(2 * pause, self.first_pause_seconds), LONGEST_PAUSE_SECONDS)
                pause = max(pause, getattr(error, "pause_seconds", 0.0))
                limited = getattr(error, "limited", False)
                request.tries += not limited
                over = last and (still or not limited)
                self._again(request, url, str(error) or type(error).__name__, results, over)
            except Exception as error:  # ours to mend, but not to hang on
                results.put(error)
                break
            else:
                pause = 0.0
                results.put((request, answer))
        if connection is not None:
            connection.close()

    def _next(self, url: str, results: queue.SimpleQueue) -> Request | None:
        """Waits for a request whose time has come (with the lock held); None when all is done."""
        alone = len(set(self.urls)) == 1
        while self._results is results:
            now = time.monotonic()
            failed = [item for item in self._later if alone or item[1] != url]
            first = min(failed, key=lambda item: item[0], default=None)
            if first and first[0] <= now:
                self._later.remove(first)
                return first[2]
            if self._waiting:
                return self._waiting.popleft()
            self._wake.wait(first[0] - now if first else None)
        return None

    def _again(
        self, request: Request, url: str, reason: str, results: queue.SimpleQueue, over: bool
    ) -> None:
        reason = self._hidden(f"{url}: {reason}")
        with self._wake:
            if self._results is not results:  # the run has ended: nobody waits for the request
                return
            if over:
                results.put((request, Answer(reason, failed=True)))
                return
            now = time.monotonic()
            self._failures += 1
            if now - self._told >= TOLD_SECONDS:
                self._told = now
                print(f"\nrewrite: trying again after a failure: {reason}", file=sys.stderr)
            # At the start each thread may fail as often as a request; later it is time that counts.
            out = self._failures > TRIES * self.in_flight * len(self.urls)
            if self._answered:
                out = self._failures > TRIES and self._still(OUTAGE_SECONDS)
            if out:
                results.put(ValueError(f"no server answers any more. Last: {reason}"))
                return
            pause = self.first_pause_seconds * 2 ** min(max(request.tries - 1, 0), 16)
            self._later.append((now + min(pause, LONGEST_PAUSE_SECONDS), url, request))
            self._wake.notify_all()

    def _still(self, seconds: float) -> bool:
        """Whether servers that answered before have not done so for so long."""
        return bool(self._answered) and time.monotonic() - self._answered_at > seconds

    def _takes_another(self, url: str, request: Request) -> bool:
        """Whether the server answers one of the request's examples in place of its caption."""
        connection = self._connect(url)
        try:
            self._answer(url, *self._post(connection, url, _example(request)))
        except (OSError, http.client.HTTPException, _Failure, _Refusal, _Unusable):
            return False
        finally:
            connection.close()
        return True

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        assert parts.hostname is not None
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout_seconds)

    def _ask(self, connection, url: str, request: Request) -> Answer:
        with suppress(_Refusal):
            return self._answer(url, *self._post(connection, url, request))
        try:  # whose fault is it?
            self._answer(url, *self._post(connection, url, _example(request)))
        except _Refusal as error:
            raise self._blame(url, str(error)) from None
        try:
            return self._answer(url, *self._post(connection, url, request))
        except _Refusal as error:
            return Answer(self._hidden(str(error)), refused=True)

    def _post(self, connection, url: str, request: Request) -> tuple[int, str | None, bytes]:
        """The answer's status, Retry-After and content."""
        chat = self.sampling.chat
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            "seed": request.seed,
        }
        body |= {"messages" if chat else "prompt": self.sampling.prompt(request)}
        if not chat:
            body["stop"] = ["\n"]
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        path = urlsplit(url).path + ("/chat/completions" if chat else "/completions")
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.headers.get("Retry-After"), response.read()

    def _answer(self, url: str, status: int, retry_after: str | None, data: bytes) -> Answer:
        """Raises _Refusal, _Unusable or _Failure where there is none."""
        said = f"{status} {data[:300].decode(errors='replace')}"
        if status in _REFUSED:
            raise _Refusal(said)
        if status in _UNFIT:
            raise self._blame(url, said)
        if status != 200:
            raise _Failure(said, _pause(retry_after), status == 429 or retry_after is not None)
        try:
            found = json.loads(data)
            choice = found["choices"][0]
            text = choice["message"]["content"] if self.sampling.chat else choice["text"]
            end = choice.get("finish_reason")
            tokens = (found.get("usage") or {}).get("completion_tokens") or 0
            if text is None:
                text = ""
            if not isinstance(text, str) or not isinstance(tokens, int):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            shown = data[:200].decode(errors="replace")
            raise _Failure(f"expected a completion, found {shown!r}") from None
        if end in ("abort", "error"):  # vLLM's and SGLang's, where they stop in the middle
            raise _Failure(f"an answer that ended with {end!r}")
        with self._wake:
            self._failures, self._answered_at = 0, time.monotonic()
            self._answered.add(url)
        if end == "content_filter":
            return Answer(end, tokens, refused=True)
        cut = end == "length"
        if not self.sampling.chat and "\n" in text:
            text, cut = first_line(text), False  # a server that knows no `stop`
        return Answer(text, tokens, cut)

    def _blame(self, url: str, said: str) -> Exception:
        """What a server that takes no request at all is: ill, if it took one before."""
        way = "/chat/completions" if self.sampling.chat else "/completions"
        return _Failure(said) if url in self._answered else _Unusable(f"{url}{way}: {said}")

    def _hidden(self, text: str) -> str:
        """Servers repeat the key in their errors; it must reach no file."""
        return text.replace(self._key, f"[{KEY_VARIABLE}]") if self._key else text


class _Failure(Exception):
    """An answer that may be better the next time; limited: the server asks for patience."""

    def __init__(self, text: str, pause_seconds: float = 0.0, limited: bool = False):
        super().__init__(text)
        self.pause_seconds, self.limited = pause_seconds, limited


class _Refusal(Exception):
    """A server's word that it does not take this request."""


class _Unusable(Exception):
    """A server to which no request makes sense."""


def _example(request: Request) -> Request:
    """A request that any server takes."""
    return replace(request, caption=request.examples[0][0])


def _pause(retry_after: str | None) -> float:
    """Seconds that a server asks to wait; what it says as a date is left to the back-off."""
    try:
        return min(float(retry_after or 0), 10 * LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--server {url}: expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"--server {parts.hostname}: an address without user, password or query; "
            f"the key goes into the environment variable {KEY_VARIABLE}"
        )
    return url.rstrip("/")
