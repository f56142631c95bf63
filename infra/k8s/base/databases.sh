#!/bin/sh
# One database and one role for each program that needs one; PostgreSQL's image runs this once, on an empty volume.
# A role sees its own database alone: who breaks into MLflow cannot rewrite the ledger.
set -eu
for name in prefect mlflow ledger; do
    variable="$(echo "$name" | tr '[:lower:]' '[:upper:]')_DB_PASSWORD"
    test -n "$(printenv "$variable")" || { echo "$variable is not set."; exit 1; }
    psql --no-psqlrc --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname=postgres --set=name="$name" <<SQL
\getenv password $variable
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
