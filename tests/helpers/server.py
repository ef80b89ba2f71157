"""A real HTTP server with an OpenAI-compatible chat endpoint, which misbehaves as it is told."""

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD, CUT = "good", "cut"


def rating_of(prompt):
    """What the honest judge says of a prompt."""
    return 1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def honest(prompt):
    if "[[A]]" in prompt or "Assistant B" in prompt:
        return f"I choose [[{'ABC'[rating_of(prompt) % 3]}]]."
    return f"Well said. Rating: [[{rating_of(prompt)}]]"


class Server:
    """behave(prompt, times asked before) -> GOOD, CUT, a status, or a (status, body) pair, or seconds to hang.

    served: prompts that were answered as they should. bodies, paths: of requests.
    """

    def __init__(self):
        self.behave = lambda prompt, before: GOOD
        self.reply = honest
        self.asked, self.served = Counter(), Counter()
        self.bodies, self.paths = [], []
        self.keys = set()
        self.seconds = 0.0
        self.most_at_once = self._at_once = 0
        self._turn = threading.Lock()

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self._turn:
            before = self.asked[prompt]
            self.asked[prompt] += 1
            self.keys.add(handler.headers["Authorization"])
            self.bodies.append(body)
            self.paths.append((handler.path, handler.headers["X-Api-Key"]))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.seconds)
        done = self.behave(prompt, before)
        with self._turn:
            self._at_once -= 1
        if isinstance(done, float):
            time.sleep(done)
            return 200, json.dumps(completion(self.reply(prompt)))
        if done == CUT:
            return 200, CUT
        if callable(done):
            done = done(body)
        if done == GOOD:
            with self._turn:
                self.served[prompt] += 1
            return 200, json.dumps(completion(self.reply(prompt)))
        return (done, json.dumps({"error": {"message": f"status {done}"}})) if isinstance(done, int) else done


def completion(text, **usage):
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110, **usage},
    }  # fmt: skip


@contextmanager
def serving():
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            status, body = server.answer(self)
            content = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) + (100 if body == CUT else 0)))
            self.close_connection = body == CUT
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            with suppress(OSError):  # the client has given up
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # a client that was killed
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


if __name__ == "__main__":  # a process of its own, until its input ends
    with serving() as alone:
        alone.seconds = 0.05
        print(alone.url, flush=True)
        sys.stdin.read()
