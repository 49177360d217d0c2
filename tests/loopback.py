"""HTTP servers on loopback for the tests of clients; nothing of one outlives its test."""

import contextlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """What the handlers share: silence, connections that stay open, and an end to each."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 300  # seconds that a client which is still there may send nothing

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    # Closing it waits for its threads: what one did later would reach into the next test.
    daemon_threads = False
    request_queue_size = 128

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # that of a client that was killed, or hung up
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(handler, **attributes):
    """A server with these attributes; its `url` ends in /v1."""
    server = Server(("127.0.0.1", 0), handler)
    for name, value in attributes.items():
        setattr(server, name, value)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
