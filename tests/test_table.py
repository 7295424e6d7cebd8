"""The table of cases and what is refused in it."""

import pytest

from medsynth_jax.data.table import read_table
from medsynth_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "series").mkdir()
  for name in ("a_t1.nii.gz", "a_ct.mha", "b_t1.nii.gz", "m.nii"):
    (tmp_path / "images" / name).write_bytes(b"x")
  return tmp_path


def table(folder, text, **how):
  (folder / "cases.csv").write_text(text, **how)
  return read_table(folder / "cases.csv")


def test_columns_are_told_apart(folder):
  result = table(folder, "subject,session,group,age,t1,ct,mask,mask_tumour,note\n"
                         "a,left,site1,50,images/a_t1.nii.gz,images/a_ct.mha,images/m.nii,,\n"
                         "a,right,site1,50,images/b_t1.nii.gz,series,,images/m.nii,\"x, y\"\n"
                         "b,,site2,,,images/a_ct.mha,,,\n")
  assert result.modalities == ("t1", "ct") and result.rois == ("tumour",)
  assert result.metadata == ("age", "note")
  first, second, third = result.rows
  assert (first.line, first.subject, first.session, first.name) == (2, "a", "left", "a_left")
  assert first.images["t1"] == str(folder / "images" / "a_t1.nii.gz")
  assert first.mask and not first.rois and second.rois and not second.mask
  assert second.images["ct"] == str(folder / "series")
  assert second.metadata == {"age": "50", "note": "x, y"}
  assert list(third.images) == ["ct"] and third.group == "site2" and third.fold == -1


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_spreadsheet_dialects(folder, delimiter):
  text = "\ufeffsubject,split,t1\r\na,Val,images/a_t1.nii.gz\r\n\r\n".replace(",", delimiter)
  result = table(folder, text, encoding="utf-8")
  assert result.rows[0].split == "validation" and result.modalities == ("t1",)


A, B = "a,images/a_t1.nii.gz", "b,images/b_t1.nii.gz"


@pytest.mark.parametrize("text, says", [
  ("", "is empty"),
  ("subject,t1\n", "no row"),
  ("patient,t1\na,x.nii\n", "no column 'subject'.*patient, t1"),
  (f"subject,t1,t1\n{A},\n", "'t1' appears twice"),
  (f"subject,,t1\n{A},\n", "has no name"),
  (f"subject,t1\n{A},extra\n", "row 2 has 3 cells, the header 2"),
  (f"subject,t1\n{A}\n,images/b_t1.nii.gz\n", "row 3 has no subject"),
  (f"subject,t1\n{A}\n{A}\n", "rows 2 and 3 are both subject 'a'"),
  ("subject,age\na,50\n", "no column of images"),
  (f"subject,t1\n{A}\nb,images/c_t1.nii.gz\n", "row 3, column 't1': no such file"),
  (f"subject,t1\n{A}\nb,images/b_t1.nii.g\n", "row 3, column 't1': .* is neither an image"),
  (f"subject,t1\n{A}\nb,\n", "row 3 has no image"),
  (f"subject,t1,mask\n{A},images/none.nii\n", "row 2, column 'mask': no such file"),
  (f"subject,t1,split\n{A},holdout\n", "row 2, column 'split': 'holdout'"),
  (f"subject,t1,fold\n{A},one\n", "row 2, column 'fold': 'one'"),
  ("subject,my t1\na,images/a_t1.nii.gz\n", "'my t1' cannot name"),
  ("subject,valid\na,images/a_t1.nii.gz\n", "'valid' cannot name"),
  (f"subject,t1,ceiling_t2\n{A},images/m.nii\n", "'ceiling_t2' is the noise-free image"),
])
def test_refusals_name_row_and_column(folder, text, says):
  with pytest.raises(UserError, match=says) as error:
    table(folder, text)
  assert "cases.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_column_of_another_image_format_is_told(folder):
  with pytest.raises(UserError, match="format that is not read"):
    table(folder, "subject,t1,t2\na,a.nii.gz,a.png\nb,b.nii.gz,b.png\n")


def test_no_table_and_no_text(folder):
  with pytest.raises(UserError, match="no such table"):
    read_table(folder / "none.csv")
  (folder / "cases.csv").write_bytes(b"subject,t1\n\xff\xfe,x.nii\n")
  with pytest.raises(UserError, match="UTF-8"):
    read_table(folder / "cases.csv")
