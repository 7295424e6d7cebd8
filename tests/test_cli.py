"""How commands fail: one line, a status, no traceback."""

import errno

import pytest
from absl import app

from medsynth_jax import cli
from medsynth_jax.errors import UserError


def failing(error, monkeypatch):
  """`cli.run` of a main that raises `error`."""
  def main(argv):
    raise error
  monkeypatch.setattr(app, "run", lambda function, flags_parser: function(["program"]))
  with pytest.raises(SystemExit) as left:
    cli.run(main)
  return left.value.code


@pytest.mark.parametrize("error, code, line", [
  (UserError("row 3: no such file"), 2, "error: row 3: no such file"),
  (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
  (ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device"), 2, "the disk is full"),
  (KeyboardInterrupt(), 130, "interrupted"),
])
def test_one_line_and_a_status(error, code, line, monkeypatch, capsys):
  assert failing(error, monkeypatch) == code
  out = capsys.readouterr().err
  assert line in out and len(out.strip().splitlines()) == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
  monkeypatch.setattr(app, "run", lambda function, flags_parser: function(["program"]))
  with pytest.raises(ZeroDivisionError):
    cli.run(lambda argv: 1 / 0)
