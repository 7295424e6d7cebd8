"""Preparing again: what is there already, what was interrupted, a full disk, several workers."""

import errno
import os

import numpy as np
import pytest
from test_prepare import config_for, edited, write_cases

from medsynth_jax.data import case_files, dataset
from medsynth_jax.data.dataset import load_info
from medsynth_jax.errors import UserError
from medsynth_jax.prepare import prepare


def test_the_same_call_again_does_nothing(data, table, monkeypatch, capsys):
  before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
  monkeypatch.setattr(case_files, "make", None)
  assert prepare(config_for(table, data)) == data
  assert "nothing to do" in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before


def test_another_spelling_of_the_path_is_the_same_table(data, table, monkeypatch, capsys):
  monkeypatch.chdir(table.parent)
  assert prepare(config_for(table.name, data)) == data
  assert "nothing to do" in capsys.readouterr().out


def test_foreign_files_in_the_partial_folder_stay(table, tmp_path):
  (tmp_path / "out.partial").mkdir()
  (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
  with pytest.raises(UserError, match="thesis.txt"):
    prepare(config_for(table, tmp_path / "out"))
  assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_other_content_is_refused(data, table, tmp_path):
  with pytest.raises(UserError, match="other files or another config"):
    prepare(config_for(table, data, seed=1))
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").write_text("x")
  with pytest.raises(UserError, match="is no data set"):
    prepare(config_for(table, tmp_path / "full"))
  with pytest.raises(UserError, match="is a file"):
    prepare(config_for(table, table))
  with pytest.raises(UserError, match="cannot be written"):
    prepare(config_for(table, table / "data"))


def test_changed_files_are_noticed(tmp_path):
  table = write_cases(tmp_path / "scans", 2)
  config = config_for(table, tmp_path / "data")
  prepare(config)
  os.utime(tmp_path / "scans" / "1_ct.mha", (1, 1))
  with pytest.raises(UserError, match="other files or another config"):
    prepare(config)


def test_an_interrupted_run_continues(data, table, tmp_path, monkeypatch):
  make, made = case_files.make, []

  def interrupted(job):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append(job.row.subject)
    make(job)
  monkeypatch.setattr(case_files, "make", interrupted)
  config = config_for(table, tmp_path / "data", name="data")
  with pytest.raises(KeyboardInterrupt):
    prepare(config)
  assert not (tmp_path / "data").exists() and made == ["s0", "s1"]
  monkeypatch.setattr(case_files, "make", lambda job: (made.append(job.row.subject), make(job)))

  def killed(*_):
    (tmp_path / "data.partial" / "records" / "0.9.0").mkdir(parents=True)
    raise KeyboardInterrupt
  records = dataset.write_records
  monkeypatch.setattr(dataset, "write_records", killed)
  with pytest.raises(KeyboardInterrupt):
    prepare(config)
  assert not (tmp_path / "data").exists() and made == ["s0", "s1", "s2", "s3"]
  monkeypatch.setattr(dataset, "write_records", records)
  prepare(config)
  assert len(made) == 4 and not (tmp_path / "data.partial").exists()
  assert load_info(tmp_path / "data").hash == load_info(data).hash
  assert [p.name for p in (tmp_path / "data" / "records").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("where", ["case", "records", "array_record"])
def test_a_full_disk_leaves_no_half_data_set(table, tmp_path, monkeypatch, where):
  def full(*_, **__):
    if where == "array_record":
      raise RuntimeError("UNKNOWN: writing failed: No space left on device")
    raise OSError(errno.ENOSPC, "No space left on device")
  patch = (np, "savez") if where == "case" else (dataset, "write_records")
  with monkeypatch.context() as patched:
    patched.setattr(*patch, full)
    with pytest.raises(UserError, match="disk is full.*continues"):
      prepare(config_for(table, tmp_path / "data"))
  assert not (tmp_path / "data").exists()
  assert not list(tmp_path.rglob("*.tmp"))
  prepare(config_for(table, tmp_path / "data"))
  assert (tmp_path / "data" / "dataset.json").is_file()


def test_parallel_workers_make_the_same_data_set(data, table, tmp_path):
  prepare(config_for(table, tmp_path / "data", workers=2))
  assert load_info(tmp_path / "data").hash == load_info(data).hash


def test_an_error_in_a_worker_process_is_one_line(table, tmp_path):
  path = edited(table, tmp_path, str(table.parent / "1_ct.mha"), str(tmp_path / "bad.mha"))
  (tmp_path / "bad.mha").write_text("no image")
  with pytest.raises(UserError, match=r"row 3 of .*edited.csv: .*bad.mha: damaged"):
    prepare(config_for(path, tmp_path / "data", workers=2))
  assert not (tmp_path / "data").exists()
