"""Ends a build whose torch was made for another CUDA than the base image: it would fail only on a rented GPU."""

import os
import sys

import torch

base, wheel = os.environ.get("CUDA_VERSION"), torch.version.cuda
print(f"CUDA of the base image: {base or 'none'}; of torch {torch.__version__}: {wheel or 'none'}")
if base and base.split(".")[0] != (wheel or "").split(".")[0]:
    sys.exit("They differ. Build with another BASE_TAG, or with the TORCH_VERSION and TORCH_INDEX that fit this one.")
