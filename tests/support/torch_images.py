"""Image models in PyTorch that no installed package has: the references of LPIPS and EfficientNet-Lite0.

Their state dicts carry the names of the public files.
"""

import torch
from torch import nn
from torch.nn import functional as F

VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def _alex() -> tuple[list[nn.Module], list[int]]:
    layers = [
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]
    return layers, [1, 4, 7, 9, 11]


def _vgg() -> tuple[list[nn.Module], list[int]]:
    layers, cin = [], 3
    for width in VGG:
        layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(cin, width, 3, padding=1), nn.ReLU()]
        cin = cin if width == "M" else width
    return layers, [3, 8, 15, 22, 29]


class TorchLPIPS(nn.Module):
    """richzhang/PerceptualSimilarity, version 0.1, in evaluation mode; the learnt weights are at least 0."""

    def __init__(self, backbone: str):
        super().__init__()
        layers, self.ends = {"alex": _alex, "vgg": _vgg}[backbone]()
        self.features = nn.Sequential(*layers)
        widths = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}[backbone]
        for number, width in enumerate(widths):
            setattr(self, f"lin{number}", nn.Conv2d(width, 1, 1, bias=False))
            nn.init.uniform_(getattr(self, f"lin{number}").weight, 0, 1)

    def stages(self, x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, x, y):
        total = 0
        for number, (a, b) in enumerate(zip(self.stages(x), self.stages(y), strict=True)):
            total = total + getattr(self, f"lin{number}")((a - b).square()).mean((1, 2, 3))
        return total


class SameConv(nn.Conv2d):
    """TensorFlow's "SAME": what cannot be divided is padded below and to the right."""

    def forward(self, x):
        pads = []
        for length in reversed(x.shape[2:]):
            size, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, groups=self.groups)


class _Block(nn.Module):
    def __init__(self, cin, cout, size, stride, expand):
        super().__init__()
        wide = cin * expand
        if expand > 1:
            self._expand_conv = SameConv(cin, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = SameConv(wide, wide, size, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = SameConv(wide, cout, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(cout, eps=1e-3)
        self.expand, self.skip = expand, stride == 1 and cin == cout

    def forward(self, x):
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expand > 1 else x
        h = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(h)))))
        return x + h if self.skip else h


class TorchEfficientNetLite0(nn.Module):
    """efficientnet_lite_pytorch's "efficientnet-lite0"."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        arguments = (
            "r1_k3_s1_e1_i32_o16 r2_k3_s2_e6_i16_o24 r2_k5_s2_e6_i24_o40 r3_k3_s2_e6_i40_o80 r3_k5_s1_e6_i80_o112"
        )
        arguments += " r4_k5_s2_e6_i112_o192 r1_k3_s1_e6_i192_o320"
        blocks = []
        for text in arguments.split():
            count, size, stride, expand, cin, cout = (int(part[1:]) for part in text.split("_"))
            blocks += [
                _Block(cin if i == 0 else cout, cout, size, stride if i == 0 else 1, expand) for i in range(count)
            ]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def extract(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x):
        return self._fc(self.extract(x))
