"""The one exception that stands for a user's mistake."""


class UserError(Exception):
  """Bad input or a bad setting: one line that says what, where, and what to do about it.

  The commands print it without a traceback and exit with status 2 (see `cli.run`).
  """
