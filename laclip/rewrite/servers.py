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
from typing import Any
from urllib.parse import urlsplit

from laclip.rewrite.engine import Answer, Request, Sampling, first_line

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 8  # of one request, over all servers
LONGEST_PAUSE_SECONDS = 60.0
TOLD_SECONDS = 30.0  # between two lines about failures
_REFUSED = (400, 413, 422)  # fault of the request
_FATAL = (401, 403, 404, 405)  # no request will ever succeed


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
        self._closed = False
        self._succeeded = False
        self._failures = 0  # since the last answer
        self._told = -TOLD_SECONDS

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        """Every request with its answer, in the order in which answers come.

        A request that fails is tried again, by whichever server is free, up to TRIES times.
        Raises ValueError when servers refuse all requests, and when none answers any more.
        """
        results: queue.SimpleQueue = queue.SimpleQueue()
        self._closed, self._failures = False, 0
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
                self._closed = True
                self._waiting.clear()
                self._later.clear()
                self._wake.notify_all()

    def _work(self, url: str, results: queue.SimpleQueue) -> None:
        """One thread, one connection: takes requests until the engine is closed."""
        connection = None
        pause = 0.0
        while True:
            with self._wake:
                if pause and not self._closed:
                    self._wake.wait_for(lambda: self._closed, timeout=pause)
                request = self._next(url)
            if request is None:
                break
            try:
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
                self._again(request, url, str(error) or type(error).__name__, results)
            except Exception as error:  # ours to mend, but not to hang on
                results.put(error)
                break
            else:
                pause, self._failures, self._succeeded = 0.0, 0, True
                results.put((request, answer))
        if connection is not None:
            connection.close()

    def _next(self, url: str) -> Request | None:
        """Waits for a request whose time has come (with the lock held); None when closed."""
        alone = len(set(self.urls)) == 1
        while not self._closed:
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

    def _again(self, request: Request, url: str, reason: str, results: queue.SimpleQueue) -> None:
        request.tries += 1
        reason = self._hidden(f"{url}: {reason}")
        with self._wake:
            if self._closed:  # the run has ended: nobody waits for this request any more
                return
            self._failures += 1
            if time.monotonic() - self._told >= TOLD_SECONDS:
                self._told = time.monotonic()
                print(f"\nrewrite: trying again after a failure: {reason}", file=sys.stderr)
            # Each thread failed a request as often as it may, and no answer came in between.
            if self._failures > TRIES * self.in_flight * len(self.urls):
                results.put(ValueError(f"no server answers any more. Last: {reason}"))
            elif request.tries >= TRIES:
                results.put((request, Answer(reason, failed=True)))
            else:
                pause = self.first_pause_seconds * 2 ** (request.tries - 1)
                when = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)
                self._later.append((when, url, request))
                self._wake.notify_all()

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        assert parts.hostname is not None
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout_seconds)

    def _ask(self, connection, url: str, request: Request) -> Answer:
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
        data = response.read()
        if response.status != 200:
            said = f"{response.status} {data[:300].decode(errors='replace')}"
            if response.status in _FATAL or (
                response.status in _REFUSED and not self._succeeded and request.tries
            ):
                raise _Unusable(f"{url}{path.removeprefix(urlsplit(url).path)}: {said}")
            if response.status in _REFUSED and self._succeeded:
                return Answer(self._hidden(said), refused=True)
            raise _Failure(said, _pause(response.headers.get("Retry-After")))
        return self._answer(data)

    def _answer(self, data: bytes) -> Answer:
        try:
            found = json.loads(data)
            choice = found["choices"][0]
            text = choice["message"]["content"] if self.sampling.chat else choice["text"]
            tokens = (found.get("usage") or {}).get("completion_tokens") or 0
            if text is None:
                text = ""
            if not isinstance(text, str) or not isinstance(tokens, int):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            shown = data[:200].decode(errors="replace")
            raise _Failure(f"expected a completion, found {shown!r}") from None
        cut = choice.get("finish_reason") == "length"
        if not self.sampling.chat and "\n" in text:
            text, cut = first_line(text), False  # a server that knows no `stop`
        return Answer(text, tokens, cut)

    def _hidden(self, text: str) -> str:
        """Servers repeat the key in their errors; it must reach no file."""
        return text.replace(self._key, f"[{KEY_VARIABLE}]") if self._key else text


class _Failure(Exception):
    """An answer that may be better the next time."""

    def __init__(self, text: str, pause_seconds: float = 0.0):
        super().__init__(text)
        self.pause_seconds = pause_seconds


class _Unusable(Exception):
    """A server to which no request makes sense."""


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
