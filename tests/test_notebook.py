"""The notebooks: they run from top to bottom, and bring no large output into the repository."""

import base64
import json
import os
import sys
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
LARGEST = 200_000  # bytes of an output


def code_cells(path):
  return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_are_small(path):
  nbformat.validate(nbformat.read(path, as_version=4))
  sizes = [len(json.dumps(o)) for cell in code_cells(path) for o in cell.outputs]
  assert max(sizes, default=0) <= LARGEST


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
  """(RUN, code cells) of the quickstart, run as it stands with a config of seconds."""
  folder = tmp_path_factory.mktemp("notebook")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("QUICKSTART_CONFIG", "configs/pix2pix.py:test")
    patch.setenv("QUICKSTART_RUN", str(folder / "run"))
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
    # `!python` is that of these tests, and finds the package where they do
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(ROOT / "colab")}}).execute()
  return folder / "run", [c for c in notebook.cells if c.cell_type == "code"]


def printed(cell) -> str:
  return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def pictures(cell, kind="image/png") -> list[bytes]:
  return [base64.b64decode(o.data[kind]) for o in cell.outputs if kind in o.get("data", {})]


def test_quickstart_installs_nothing_in_a_checkout(quickstart):
  install = quickstart[1][0]
  assert "is installed" in printed(install) and "pip" not in printed(install)


def test_quickstart_trains_and_shows_its_panels(quickstart):
  folder, (_, train, panels, *_) = quickstart
  assert "simulated data, n = 1 test" in printed(train) and "above the floor" in printed(train)
  files = sorted((folder / "evaluation" / "panels").glob("*.png"))
  assert files and pictures(panels) == [f.read_bytes() for f in files]


def test_quickstart_writes_a_ct_on_the_grid_of_the_mr(quickstart):
  folder, (*_, synthesize, check, planes) = quickstart
  assert "synthetic image written" in printed(synthesize)
  sidecar = json.loads((folder / "synthetic_ct.json").read_text())
  written = nib.load(folder / "synthetic_ct.nii.gz")
  source = nib.load(folder / "scans" / "images" / sidecar["made_from"]["t1"]["file"])
  assert written.shape == source.shape and np.array_equal(written.affine, source.affine)
  assert sidecar["units"] == "HU" and "not for diagnosis" in printed(check)
  assert f"from {np.asarray(written.dataobj).min():.0f} to" in printed(check)
  (figure,) = pictures(planes, "image/jpeg")
  assert len(figure) < LARGEST
