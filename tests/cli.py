"""The command line as tests run it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from vattn.cli import app

runner = CliRunner()


def run_json(*arguments: object, code: int = 0) -> dict:
    """Run with ``--json``: stdout must be one object and nothing else."""
    done = runner.invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output + done.stderr
    return json.loads(done.stdout)


def complaint(*arguments: object) -> str:
    """Run what must be refused: one line on stderr, exit code 2, nothing on stdout."""
    done = runner.invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr
