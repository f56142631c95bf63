"""The embedded MLflow server in one process: its database first, then its web server.

Run: python -m infra.mlflow_server DATABASE_URI ARTIFACTS_URI PORT
(what `mlflow server --workers 1` does with two processes and twice the start-up time).
"""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
from contextlib import closing


def main(database_uri: str, artifacts_uri: str, port: int) -> None:
    """Serve on loopback until ended."""
    gc.disable()  # thousands of modules come to stay: looking for garbage among them costs a tenth of the start-up
    import uvicorn  # before mlflow.server, which puts its host check in place only where it finds itself in a web server
    from mlflow.server import constants, handlers
    from sqlalchemy import make_url

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = database_uri
    os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = database_uri
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = artifacts_uri
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    # writers queue at the database, for the 20 s that MLflow gives them; SQLAlchemy's fifteen connections would turn the next one away
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW", "-1")
    # the migrations run here, once and alone: several processes at once break a fresh database
    handlers.initialize_backend_stores(database_uri, database_uri, "mlflow-artifacts:/")
    with closing(sqlite3.connect(str(make_url(database_uri).database))) as database:
        database.execute("PRAGMA journal_mode = WAL")  # kept in the file; reader and writer do not wait for each other

    from mlflow.server.fastapi_app import app

    gc.enable()
    gc.freeze()
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
