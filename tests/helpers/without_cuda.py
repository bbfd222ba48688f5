"""A plugin of pytest: a torch with CUDA asks what stands in for Triton's driver for device and stream, and no GPU."""

import torch
from triton.runtime import driver

if hasattr(torch._C, "_cuda_getDevice"):  # before sparsekern is imported, which holds both
    torch._C._cuda_getDevice = lambda: driver.active.get_current_device()
    torch._C._cuda_getCurrentRawStream = lambda device: driver.active.get_current_stream(device)
