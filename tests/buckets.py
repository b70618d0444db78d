"""A bucket server on the loopback address: gcp-storage-emulator, and what TensorStore needs beside.

The emulator gives each object a generation, and knows no conditions on it. It lists by prefix, not
by the first and last name.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import quote

import pytest

server = pytest.importorskip("gcp_storage_emulator.server")
BUCKET = "bucket"


class Conditions(server.Router):
    """Compares the generation that a write or a deletion asks for, and names that of what is read.

    Requests are answered one after another, so nothing happens in between.
    """

    at_write: dict = {}  # name of an object → what is done before it is written
    refused = False  # the bucket is another's

    def handle(self, method):
        request = server.Request(self._request_handler, method)
        bucket = request.path.partition("/b/")[2].split("/")[0]
        names = request.query.get("name") or [server.unquote(request.path.partition("/o/")[2])]
        if method != "GET":
            self.at_write.pop(names[0], lambda: None)()
        generation = "0"
        with contextlib.suppress(Exception):  # there is no such object
            found = self._request_handler.storage.get_file_obj(bucket, names[0])
            generation = found["generation"]

        asked = request.query.get("ifGenerationMatch", [generation])
        if self.refused or asked != [generation]:
            request.data  # noqa: B018 - reads it from the connection
            response = server.Response(self._request_handler)
            refusals = HTTPStatus.FORBIDDEN, HTTPStatus.PRECONDITION_FAILED
            response.status = refusals[not self.refused]
            return response.close()
        if first := request.query.get("startOffset"):  # we list all that begins with it
            self._request_handler.path += f"&prefix={quote(first[0])}"
        send = self._request_handler.send_response

        def send_with_generation(*status):
            send(*status)
            self._request_handler.send_header("x-goog-generation", generation)

        self._request_handler.send_response = send_with_generation
        super().handle(method)


@contextlib.contextmanager
def serve() -> Iterator[type[Conditions]]:
    """Serve an empty bucket of Google's kind, for this process and those that it starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    read = server._read_data  # None where there is no content, which an upload cannot be
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "Router", Conditions)
        # its answers have two parts, and the second waits 40 ms for the first one's receipt
        patch.setattr(server.RequestHandler, "disable_nagle_algorithm", True)
        patch.setattr(server, "_read_data", lambda *of: read(*of) or b"")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        with server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET):
            yield Conditions
