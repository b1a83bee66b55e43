"""Write nnunet_residual_unet.npz: weights, input and output of nnU-Net's own ResidualEncoderUNet.

Needs ``pip install --no-deps dynamic-network-architectures==0.3.1``, which kitseg doesn't depend on.
"""

from pathlib import Path

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

torch.manual_seed(0)
net = ResidualEncoderUNet(
    input_channels=1,
    n_stages=3,
    features_per_stage=(4, 4, 6),
    conv_op=nn.Conv3d,
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    n_blocks_per_stage=(1, 2, 2),
    num_classes=3,
    n_conv_per_stage_decoder=(1, 1),
    conv_bias=True,
    norm_op=nn.InstanceNorm3d,
    norm_op_kwargs={"eps": 1e-5, "affine": True},
    nonlin=nn.LeakyReLU,
    nonlin_kwargs={"inplace": True},
    deep_supervision=True,
)
for weight in net.parameters():
    nn.init.normal_(weight, std=0.3)
x = torch.randn(2, 1, 4, 16, 12)
with torch.no_grad():
    fine, coarse = net(x)
stored = {name: w for name, w in net.state_dict().items() if ".all_modules." not in name and ".encoder." not in name}
weights = {f"weights/{name}": weight.numpy() for name, weight in stored.items()}
np.savez_compressed(
    Path(__file__).with_suffix(".npz"), x=x.numpy(), fine=fine.numpy(), coarse=coarse.numpy(), **weights
)
