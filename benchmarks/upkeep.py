"""What every measurement needs around it: the words of an error, and a clean device afterwards."""

import gc

import torch


def first_line(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"


def free() -> None:
    """Compiled functions and cached memory of one case are no business of the next."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
