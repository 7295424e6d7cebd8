"""Numbers and grids of an evaluation as text."""

from collections.abc import Sequence


def number(x: float) -> str:
  """Four figures or fewer."""
  return f"{x:.2f}" if abs(x) >= 10 else f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def aligned(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Lines of cells in columns, the first `left` of them flush left, the others flush right."""
  widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
  return ["  ".join(cell.ljust(w) if i < left else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
          for line in cells]
