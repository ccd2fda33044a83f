"""sampled_conv against plain torch, and beside the convolution's own passes."""

import pytest
import torch
import torch.nn.functional as F

from dropinf import ops

B, R = 8, 1024

# Layers of a ResNet for 224x224 images: C, O, side of the plane, side of the kernel.
SHAPES = [(64, 64, 56, 3), (128, 128, 28, 3), (256, 256, 14, 3), (512, 512, 7, 3), (256, 64, 56, 1)]

# Contestant -> smallest and largest allowed of its time over ours.
TO_REACH = {"forward + input gradient": (20, None), "unfold + index": (4, None)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sampled_conv(timed, shape):
    C, O, side, kernel = shape
    padding = kernel // 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, side, side, generator=generator)
    dy = torch.randn(B, O, side, side, generator=generator)
    weight = torch.randn(O, C, kernel, kernel, generator=generator)
    I = C * kernel * kernel
    at = torch.randperm(O * I, generator=generator)[:R].sort().values
    o_long, i_long = at // I, at % I
    o_idx, i_idx = o_long.int(), i_long.int()
    options = {
        "kernel_size": (kernel, kernel),
        "stride": (1, 1),
        "padding": (padding, padding),
        "dilation": (1, 1),
    }

    def unfold_index():  # an example at a time: all at once, the patches take nine times x
        rows = []
        for b in range(B):
            patches = F.unfold(x[b : b + 1], kernel, padding=padding)[0]  # [I, T]
            rows.append((patches[i_long] * dy[b].flatten(1)[o_long]).sum(1))
        return torch.stack(rows)

    def forward():
        return F.conv2d(x, weight, padding=padding)

    def input_gradient():
        return torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            None,
            [1, 1],
            [padding] * 2,
            [1, 1],
            False,
            [0, 0],
            1,
            [True, False, False],
        )[0]

    contestants = {
        "dropinf": lambda: ops.sampled_conv(x, dy, o_idx, i_idx, **options, backend="cpu"),
        "unfold + index": unfold_index,
        "forward": forward,
        "input gradient": input_gradient,
        "forward + input gradient": lambda: (forward(), input_gradient()),
    }
    torch.testing.assert_close(contestants["dropinf"](), unfold_index(), atol=1e-2, rtol=0)
    timed(contestants, "dropinf", TO_REACH)
