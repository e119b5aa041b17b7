"""Where there is no GPU, the kernels run through Triton's interpreter; it is chosen at import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.hasten()
