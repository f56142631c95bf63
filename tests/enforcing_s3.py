"""An S3 server that enforces conditional writes: moto's, over HTTP. Run: python -m tests.enforcing_s3 PORT

One request at a time: moto looks for the object and writes it in two steps, which only S3 itself does as one for many at once.
"""

from __future__ import annotations

import logging
import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple


def main(port: int) -> None:
    """Serve on loopback until ended."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, application, threaded=False, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[1]))
