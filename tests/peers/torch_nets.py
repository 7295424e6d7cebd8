"""Networks of the published architectures in plain torch.nn, layer by layer those of our defaults.

Batch norm is instance norm in both, and biases stand where ours do, so that the numbers of
parameters are equal.
"""

import torch
from torch import nn


def normed(*layers: nn.Module, width: int, affine: bool) -> nn.Sequential:
  return nn.Sequential(*layers, nn.InstanceNorm2d(width, affine=affine))


class UNetGenerator(nn.Module):
  """pix2pix's U-Net (arXiv 1611.07004, appendix 6.1.1), [B, 1, H, W] to the same."""

  def __init__(self, base: int = 64, depth: int = 8, dropout: float = 0.5):
    super().__init__()
    widths = [base * min(2**level, 8) for level in range(depth)]
    options = {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}
    self.down = nn.ModuleList([nn.Conv2d(1, base, **options)])
    for level in range(1, depth):
      conv = nn.Conv2d(widths[level - 1], widths[level], **options)
      last = level == depth - 1
      self.down.append(conv if last else normed(conv, width=widths[level], affine=True))
    self.up = nn.ModuleList()
    for level in range(depth - 1, 0, -1):
      inputs, width = widths[level] * (1 if level == depth - 1 else 2), widths[level - 1]
      block = normed(nn.ConvTranspose2d(inputs, width, **options), width=width, affine=True)
      if depth - 4 <= level < depth - 1 and width == widths[-1]:
        block.append(nn.Dropout(dropout))
      self.up.append(block)
    self.head = nn.ConvTranspose2d(2 * base, 1, 4, 2, 1)

  def forward(self, x):
    skips = []
    for level, layer in enumerate(self.down):
      x = layer(nn.functional.leaky_relu(x, 0.2) if level else x)
      skips.append(x)
    x = skips.pop()
    for layer in self.up:
      x = torch.cat([skips.pop(), layer(torch.relu(x))], 1)
    return torch.tanh(self.head(torch.relu(x)))


class PatchGAN(nn.Sequential):
  """pix2pix's discriminator (appendix 6.1.2), source and image [B, 2, H, W] to patch logits."""

  def __init__(self, base: int = 64, n_layers: int = 3):
    layers, inputs = [], 2
    for level in range(n_layers + 1):
      width = base * min(2**level, 8)
      conv = nn.Conv2d(inputs, width, 4, 2 if level < n_layers else 1, 1, bias=level == 0)
      layers += [normed(conv, width=width, affine=True) if level else conv, nn.LeakyReLU(0.2)]
      inputs = width
    super().__init__(*layers, nn.Conv2d(inputs, 1, 4, 1, 1))


class ResidualBlock(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    def half():
      return normed(nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"), width=width,
                    affine=False)
    self.layers = nn.Sequential(half(), nn.ReLU(), half())

  def forward(self, x):
    return x + self.layers(x)


class ResNetGenerator(nn.Sequential):
  """Johnson's residual generator (arXiv 1603.08155) as CycleGAN has it, [B, 1, H, W] to that."""

  def __init__(self, base: int = 64, blocks: int = 9):
    def wide(inputs, outputs):
      return nn.Conv2d(inputs, outputs, 7, padding=3, padding_mode="reflect")
    layers = [normed(wide(1, base), width=base, affine=False), nn.ReLU()]
    for width in (2 * base, 4 * base):
      conv = nn.Conv2d(width // 2, width, 3, 2, 1)
      layers += [normed(conv, width=width, affine=False), nn.ReLU()]
    layers += [ResidualBlock(4 * base) for _ in range(blocks)]
    for width in (2 * base, base):
      conv = nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1)
      layers += [normed(conv, width=width, affine=False), nn.ReLU()]
    super().__init__(*layers, wide(base, 1), nn.Tanh())
