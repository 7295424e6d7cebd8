"""How every command starts and fails: flags, and one clear line for a user's mistake."""

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from medsynth_jax import processes
from medsynth_jax.errors import UserError


def run(main: Callable[[list[str]], int | None]) -> None:
  """Runs `main` behind absl flags; see `guard` for how it fails."""
  def guarded(argv):
    if len(argv) > 1:
      raise UserError(f"unknown argument '{argv[1]}'; see --help")
    quiet()
    keep_compiled_code()
    return main(argv)
  guard(lambda: app.run(guarded, flags_parser=_parse))


def guard(work: Callable[[], None]) -> None:
  """Runs `work`.

  A UserError, a bad flag or a full disk is one line and exit status 2; Ctrl-C exits with 130; the
  end of another process of the run is one line and 1.
  """
  try:
    work()
  except UserError as error:
    _fail(f"error: {error}", 2)
  except KeyboardInterrupt:
    _fail("interrupted; the same command continues", 130)
  except Exception as error:
    if line := _disk_trouble(error):
      _fail(f"error: {line}", 2)
    if line := processes.lost(error):
      _fail(f"error: {line}", 1)
    if jax.distributed.is_initialized():
      traceback.print_exc()
      processes.leave(1)
    raise


def _fail(line: str, status: int) -> None:
  print(line, file=sys.stderr)
  processes.leave(status)
  sys.exit(status)


def _disk_trouble(error: Exception) -> str:
  """One line for a file that cannot be written; "" if the error is of another kind."""
  number = getattr(error, "errno", None)
  if number in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower():
    return "the disk is full; free space and run the same command again, it continues"
  if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST) \
      and getattr(error, "filename", None):
    return f"{error.filename}: {error.strerror}; choose another folder or mend its permissions"
  return ""


def quiet(first: bool = True) -> None:
  """Keeps the libraries' informational log lines away from the progress bar.

  Of several processes only the first passes their warnings on.
  """
  absl_logging.set_verbosity(absl_logging.WARNING if first else absl_logging.ERROR)
  logging.getLogger("orbax").setLevel(logging.WARNING)
  logging.getLogger("jax").setLevel(logging.WARNING)


def keep_compiled_code() -> None:
  """Compiled code is kept between commands, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
  if not jax.config.jax_compilation_cache_dir:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "medsynth_jax" / "xla"))


def define_config(default: str | None = None) -> flags.FlagHolder:
  """The flag `--config=configs/NAME.py[:variant]` and its `--config.field=value`."""
  return config_flags.DEFINE_config_file(
    "config", default, "Config file and variant, as configs/pix2pix.py:paper;"
    " any field is overridden by --config.field=value.", lock_config=True)


def read_config(name: str, fields: Sequence[str] = ()) -> ConfigDict:
  """The config that the flags `--config=name` and `fields` ("--config.field=value") give.

  Raises:
    UserError: no such file or variant, an unknown field, a value of another type.
  """
  values, argv = flags.FlagValues(), ["", f"--config={name}", *fields]
  config = config_flags.DEFINE_config_file("config", None, "", flag_values=values,
                                           lock_config=True, sys_argv=argv)
  _parse(argv, values)
  return config.value


def changed(config: ConfigDict, fields: Sequence[str]) -> ConfigDict:
  """A copy of a config with fields ("config.field=value") set as on a command line.

  Raises:
    UserError: as `read_config`.
  """
  values, argv = flags.FlagValues(), ["", *(f"--{field}" for field in fields)]
  with _one_line():
    held = config_flags.DEFINE_config_dict("config", config.copy_and_resolve_references(), "",
                                           flag_values=values, lock_config=True, sys_argv=argv)
  _parse(argv, values)
  return held.value


def _parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  with _one_line():
    rest = values(argv)
    if "config" in values and values["config"].value is not None:
      values["config"].value.keys()  # the error of a file that could not be read waits in it
    return rest


@contextlib.contextmanager
def _one_line():
  """What flags and configs raise as a UserError."""
  try:
    yield
  except UserError:
    raise
  except flags.Error as error:
    raise UserError(_line(error)) from None
  except (AttributeError, KeyError) as error:
    raise UserError(f"unknown config field: {_line(error)}; --help shows the fields") from None
  except (TypeError, ValueError) as error:
    raise UserError(f"config: {_line(error)}") from None
  except OSError as error:
    raise UserError(f"--config: {_line(error).rpartition('] ')[2]}; give configs/NAME.py or"
                    " configs/NAME.py:variant") from None


def _line(error: Exception) -> str:
  text = str(error.args[0]) if error.args else str(error)
  return " ".join(text.split())
