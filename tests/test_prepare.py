"""From a table of scans to a data set: what is stored, shown and refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from medsynth_jax import prepare as preparing
from medsynth_jax.data import case, dataset, qc, volumes
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.data.intensities import Scaling, rules_for
from medsynth_jax.errors import UserError
from medsynth_jax.prepare import default_config, prepare

ROOT = Path(__file__).parents[1]
MR = np.diag([-2.0, -2.0, 4.0, 1.0])  # voxels run to the left and to the back, as ITK's do
MR[:3, 3] = (20, 30, -8)
SHAPE = (20, 24, 6)


def phantom(seed, shape, affine):
  """A bright ball with a dark core about the origin, a little different each time: T1-like."""
  rng = np.random.default_rng(seed)
  index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
  place = index @ affine[:3, :3].T + affine[:3, 3] - (0, 5, 0)
  radius = np.sqrt((place ** 2).sum(-1))
  tissue = np.where(radius < 16, np.where(radius < 6 + seed, 300.0, 800.0), 0.0)
  return (tissue + rng.uniform(1, 20, shape)).astype(np.float32), radius


def write_cases(folder, n=4, ct=True):
  """n subjects: MR on a coarse LPS+ grid, CT on a finer, wider one; a tumour mask on the CT's."""
  folder.mkdir(parents=True, exist_ok=True)
  fine = np.diag([1.0, 1.0, 2.0, 1.0])
  fine[:3, 3] = (-24, -24, -14)
  lines = ["subject,group,age,ct,t1,ceiling_t1,mask_tumour"]
  for i in range(n):
    t1, _ = phantom(i, SHAPE, MR)
    hu, radius = phantom(i, (44, 58, 12), fine)
    hu = np.where(radius < 16, hu / 10, -1000).astype(np.int16)
    hu[:, -4:-2] = 100  # a table
    volumes.write(folder / f"{i}_t1.nii.gz", t1, MR)
    volumes.write(folder / f"{i}_c.nii.gz", t1 + 1, MR)
    volumes.write(folder / f"{i}_ct.mha", hu, fine)
    volumes.write(folder / f"{i}_m.nrrd", radius < 6 + i, fine)
    lines.append(f"s{i},site{i % 2},{50 + i},{i}_ct.mha,{i}_t1.nii.gz,{i}_c.nii.gz,{i}_m.nrrd")
  (folder / "cases.csv").write_text("\n".join(lines) + "\n")
  return folder / "cases.csv"


def config_for(table, out, /, **fields):
  config = default_config()
  config.update({"table": str(table), "out": str(out), "workers": 1})
  config.update(fields)
  return config


def edited(table, folder, old, new):
  """A copy of the table with absolute paths and one thing changed."""
  lines = table.read_text().splitlines()
  absolute = [lines[0]] + [",".join(
    str(table.parent / c) if "." in c else c for c in line.split(",")) for line in lines[1:]]
  text = "\n".join(absolute)
  assert old in text
  (folder / "edited.csv").write_text(text.replace(old, new, 1))
  return folder / "edited.csv"


def test_the_data_set_says_what_it_holds(data):
  info = load_info(data)
  assert info.names == ("ct", "t1") and tuple(info.modalities) == ("ct", "t1", "ceiling_t1")
  assert (info.reference, info.plane, info.rois) == ("t1", 2, ("tumour",))
  np.testing.assert_allclose(info.spacing, (2, 2, 4))
  assert [len(info.split(s)) for s in dataset.SPLITS] == [3, 0, 1]
  assert info.notes["counts"]["train"] == {"subjects": 3, "cases": 3, "ct": 3, "t1": 3,
                                           "ceiling_t1": 3}
  assert any("no validation subject" in w for w in info.notes["warnings"])
  assert info.anatomical and len(info.hash) == 64 and info.config["seed"] == 0
  assert sorted(p.name for p in data.iterdir()) == ["cases.csv", "dataset.json", "qc.png",
                                                    "records"]
  one = info.cases[1]
  assert one.metadata == {"age": "51"} and one.group == "site1" and one.shape == SHAPE
  lows = [c.images["t1"].target.low for c in info.split("train")]
  assert info.modalities["t1"].typical.low == pytest.approx(np.median(lows))
  np.testing.assert_allclose(one.images["t1"].affine, MR)  # the way back to the file's grid
  assert one.images["ct"].clipped == {"all": 0.0, "tumour": 0.0}
  assert one.images["t1"].clipped["all"] == pytest.approx(0.006, abs=0.003)


def test_stored_slices_are_the_scans(data):
  store = Store(data)
  for one in store.info.cases:
    found = store.volume(one)
    seed = int(one.subject[1:])
    t1, radius = phantom(seed, SHAPE, MR)
    t1, radius = (np.moveaxis(a[::-1, ::-1], 2, 0) for a in (t1, radius))
    np.testing.assert_allclose(found["images"]["t1"], t1, atol=0.01)
    body = radius < 16
    assert (found["mask"] == body).mean() > 0.995
    inside = radius < 5
    assert abs(found["images"]["ct"][inside].mean() - t1[inside].mean() / 10) < 5
    assert found["valid"]["t1"].all()
    assert found["valid"]["ct"][:5][body[:5]].all() and not found["valid"]["ct"][5].any()
    assert (found["images"]["ct"][~found["valid"]["ct"]] == -1024).all()
    assert ((found["rois"]["tumour"] == (radius < 6 + seed)).mean()) > 0.98
    shown = [k for k in range(6) if body[k].mean() >= 0.05]
    assert list(one.foreground["t1"]) == shown and "ceiling_t1" not in one.foreground
    assert one.images["ceiling_t1"].target == one.images["t1"].target


def test_a_new_scan_passes_the_same_functions(data, table):
  store = Store(data)
  one = store.info.cases[0]
  stored = store.volume(one)
  path = {n: table.parent / f"0_{n}" for n in ("t1.nii.gz", "ct.mha")}
  new = case.prepare_source({"t1": volumes.read(path["t1.nii.gz"])}, store.info)
  np.testing.assert_allclose(np.moveaxis(new.images["t1"], 2, 0), stored["images"]["t1"], atol=0.01)
  assert new.scans["t1"].source == one.images["t1"].source
  np.testing.assert_array_equal(np.moveaxis(new.mask, 2, 0), stored["mask"])
  np.testing.assert_allclose(new.affine, one.affine)
  # The CT alone: its own extent at the data set's spacing, since the network saw that.
  alone = case.prepare_source({"ct": volumes.read(path["ct.mha"])}, store.info)
  np.testing.assert_allclose(np.sqrt((alone.affine[:3, :3] ** 2).sum(0)), (2, 2, 4))
  assert alone.images["ct"].shape == (22, 29, 6) and len(alone.scans["ct"].source) == 3
  both = case.prepare_source({n.split(".")[0]: volumes.read(p) for n, p in path.items()},
                             store.info)
  np.testing.assert_allclose(np.moveaxis(both.images["ct"], 2, 0), stored["images"]["ct"],
                             atol=0.02)
  np.testing.assert_array_equal(both.scans["ct"].source, one.images["ct"].source)
  far = volumes.read(path["ct.mha"])
  far.affine[:3, 3] += 1000
  with pytest.raises(UserError, match="no overlap"):
    case.prepare_source({"t1": volumes.read(path["t1.nii.gz"]), "ct": far}, store.info)


def test_valid_needs_measured_voxels_only():
  image = np.full((10, 10, 4), 500, np.float32)
  image[:, :, 0] += 1
  image[:4] = 0  # outside the field of view
  scan = case.understand(volumes.Volume(image, np.eye(4)), rules_for("t1"))
  finer = np.diag([0.5, 1, 1, 1])
  placed = case.place(scan, (20, 10, 4), finer)
  assert not placed.valid[:8].any() and placed.valid[8:].all()  # 3.5 is half fill
  assert placed.foreground[8:].all()


def test_options_of_the_grid(table, tmp_path):
  config = config_for(table, tmp_path / "data", reference="ct", plane="coronal", spacing="2,2,0",
                      size="20,0,10", anatomical="no", split="1:1:2", min_foreground=0.2,
                      name="ball", simulated=True)
  info = load_info(prepare(config))
  assert info.cases[0].shape == (20, 29, 10) and info.plane == 1
  np.testing.assert_allclose(info.spacing, (2, 2, 2))
  assert (info.anatomical, info.name, info.simulated) == (False, "ball", True)
  assert [len(info.split(s)) for s in dataset.SPLITS] == [1, 1, 2]
  assert len(info.cases[0].foreground["ct"]) < 29
  store = Store(tmp_path / "data")
  assert store.volume(info.cases[0])["images"]["ct"].shape == (29, 20, 10)


def test_missing_modalities_are_kept(table, tmp_path):
  path = edited(table, tmp_path, str(table.parent / "0_t1.nii.gz"), "")
  path = edited_text(path, str(table.parent / "0_c.nii.gz"), "")
  info = load_info(prepare(config_for(path, tmp_path / "data")))
  one = info.cases[0]
  assert tuple(one.images) == ("ct",) and one.shape == (44, 58, 12)  # its own grid
  assert not info.anatomical
  found = Store(tmp_path / "data").volume(one)
  assert list(found["images"]) == ["ct"] and found["mask"].any()


def edited_text(path, old, new):
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new, 1))
  return path


def test_rules_of_a_modality(table, tmp_path):
  config = default_config(["t1", "ct"])
  config.update({"table": str(table), "out": str(tmp_path / "data"), "workers": 1})
  config.modalities.t1.target = "zscore 2"
  config.modalities.ct.source = "window -100 100"
  info = load_info(prepare(config))
  assert info.modalities["ct"].channels == 1
  assert info.modalities["t1"].target == {"kind": "zscore", "width": 2.0}
  config.modalities.t1.type = "xray"
  with pytest.raises(UserError, match="modalities.t1.type: 'xray'"):
    prepare(config)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, says", [
  ({"table": ""}, "config.table is empty"), ({"out": ""}, "config.out is empty"),
  ({"reference": "t2"}, "unknown modality 't2'"), ({"plane": "oblique"}, "config.plane"),
  ({"spacing": "1,1"}, "config.spacing: '1,1'"), ({"size": "a,b,c"}, "config.size"),
  ({"anatomical": "maybe"}, "config.anatomical"), ({"split": "8-1-1"}, "config.split"),
  ({"stratify": "age"}, "config.stratify"), ({"folds": 7}, "config.folds"),
  ({"workers": -1}, "config.workers"), ({"min_foreground": 5.0}, "config.min_foreground"),
  ({"min_foreground": 0.9}, "no slice left")])
def test_bad_settings(table, tmp_path, fields, says):
  with pytest.raises(UserError, match=says):
    prepare(config_for(table, tmp_path / "data", **fields))
  assert not (tmp_path / "data").exists()


def test_unknown_modality_section(table, tmp_path):
  config = default_config(["t2"])
  config.update({"table": str(table), "out": str(tmp_path / "data")})
  with pytest.raises(UserError, match="config.modalities.t2: no such image column"):
    prepare(config)


def bad_file(folder, kind):
  fine = np.eye(4)
  fine[:3, 3] = 900
  array, _ = phantom(0, (20, 20, 20), np.diag([2.0, 2, 2, 1]))
  path = folder / "bad.nii.gz"
  if kind == "no overlap":
    volumes.write(path, array, fine)
  elif kind == "empty mask":
    volumes.write(path, np.zeros(SHAPE, np.uint8), MR)
  elif kind == "mask elsewhere":
    volumes.write(path, np.ones((4, 4, 4), np.uint8), fine)
  elif kind == "NaN":
    array[3, 3, 3] = np.nan
    volumes.write(path, array, MR)
  return str(path)


@pytest.mark.parametrize("kind, column, says", [
  ("no overlap", "ct.mha", "no overlap: 'ct'"), ("NaN", "ct.mha", "NaN or Inf"),
  ("empty mask", "m.nrrd", "empty mask"), ("missing", "t1.nii.gz", "no such file")])
def test_bad_files_name_row_and_file(table, tmp_path, kind, column, says):
  path = edited(table, tmp_path, str(table.parent / f"2_{column}"), bad_file(tmp_path, kind))
  with pytest.raises(UserError, match=says) as error:
    prepare(config_for(path, tmp_path / "data"))
  assert "row 4" in str(error.value) and "bad.nii.gz" in str(error.value)
  assert not (tmp_path / "data").exists()


def test_a_spike_is_no_scale(tmp_path):
  """One absurd voxel would leave a few of the 16 stored bits to the patient: refused."""
  table = write_cases(tmp_path / "scans", 3, ct=False)
  path = next((tmp_path / "scans").glob("**/*t1*"))
  volume = volumes.read(path)
  array = volume.array.copy()
  array[0, 0, 0] = 1e9
  volumes.write(path, array, volume.affine)
  with pytest.raises(UserError, match="spikes or padding"):
    prepare(config_for(table, tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_masks_off_the_grid(table, tmp_path):
  bad = bad_file(tmp_path, "mask elsewhere")
  path = edited(table, tmp_path, str(table.parent / "2_m.nrrd"), bad)
  info = load_info(prepare(config_for(path, tmp_path / "data")))
  assert info.cases[2].rois == () and any("left out" in w for w in info.notes["warnings"])
  edited_text(path, "mask_tumour", "mask")
  edited_text(path, str(table.parent / "0_m.nrrd"), "")
  with pytest.raises(UserError, match="row 4 .*the mask has no voxel"):
    prepare(config_for(path, tmp_path / "other"))


def test_a_given_mask_is_the_body(table, tmp_path):
  path = edited(table, tmp_path, "mask_tumour", "mask")
  store = Store(prepare(config_for(path, tmp_path / "data")))
  _, radius = phantom(0, SHAPE, MR)
  mask = store.volume(store.info.cases[0])["mask"]
  assert (mask == (np.moveaxis(radius[::-1, ::-1], 2, 0) < 6)).mean() > 0.99


def test_the_command(table, tmp_path):
  def command(*flags):
    return subprocess.run(
      [sys.executable, "-m", "medsynth_jax.prepare", "--config=configs/prepare.py:t1",
       f"--config.table={table}", f"--config.out={tmp_path / 'data'}", *flags],
      cwd=ROOT, capture_output=True, text=True)
  wrong = command("--config.spacin=1,1,1")
  assert wrong.returncode == 2 and "unknown config field" in wrong.stderr
  assert wrong.stderr.strip().splitlines()[-1].startswith("error: ")
  assert "Traceback" not in wrong.stderr and not (tmp_path / "data").exists()
  right = command("--config.modalities.t1.target=percentile 1 99", "--config.workers=1")
  assert right.returncode == 0, right.stderr
  assert "4 cases of 4 subjects" in right.stdout
  assert load_info(tmp_path / "data").modalities["t1"].target["high"] == 99


# --- the sheet -------------------------------------------------------------------------------


def test_slices_are_shown_as_radiologists_do():
  volume = np.zeros((4, 5, 6))
  volume[-1, -1, -1] = 1  # right, front, top
  places = {plane: tuple(int(i) for i in np.argwhere(qc.display(
    volume, plane, -1, (1, 2, 4))[0])[0]) for plane in range(3)}
  assert places == {2: (0, 0), 1: (0, 0), 0: (0, 0)}  # top left: patient's right, front, head
  assert [qc.display(volume, p, 0, (1, 2, 4))[1] for p in range(3)] == [2, 4, 2]
  assert qc.display(volume, 2, 0, (1, 1, 1))[0].shape == (5, 4)


def test_the_sheet_shows_every_case_and_a_shift(data):
  page = np.asarray(Picture.open(data / "qc.png"))
  assert page.shape[2] == 3 and page.shape[0] > 4 * qc.TILE
  image = np.where(np.abs(np.linspace(-1, 1, 40))[:, None, None] < 0.5, 800.0, 0.0) \
    * np.ones((40, 40, 20))
  mask = image > 0
  shifted = np.roll(image, 6, axis=0)
  strip = qc.strip("a", {"x": image, "y": shifted}, dict.fromkeys("xy", Scaling("linear", 0, 800)),
                   "x", mask, np.eye(4))
  red = (strip == qc.RED).all(-1)[qc.TEXT:]
  left, right = red[:, :qc.TILE], red[:, qc.TILE:2 * qc.TILE]
  np.testing.assert_array_equal(left[30:-30], right[30:-30])  # the same contour on both
  bright = strip[qc.TEXT + qc.TILE // 4, qc.TILE:2 * qc.TILE, 0] > 200
  edges = np.flatnonzero(right[qc.TILE // 4])
  assert not bright[edges[0] + 10] or not bright[edges[-1] - 10]  # the image does not fill it
  assert preparing.summary(load_info(data), data).count("\n") >= 4
