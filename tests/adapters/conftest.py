"""Models for the adapter tests; the libraries' own chatter is turned off."""

import diffusers
import pytest
import tiny_models
import torch
import transformers
from block_kernels import kernels  # noqa: F401 - a fixture

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small are no quicker on two threads, and far slower where a thread must wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """On a GPU convolutions of float32 round like those of float16, unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def unet():
    """A small UNet with 6 spatial attn1, in evaluation mode."""
    return tiny_models.small_unet()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A saved Stable Diffusion pipeline without LinFusion weights. Not to be written to."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_models.sd_pipeline(folder).save_pretrained(folder)
    return folder
