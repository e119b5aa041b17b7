"""Loading pipelines for the examples; what is not to be had ends in one line, not a traceback."""

import warnings
from pathlib import Path

try:
    import diffusers
    import torch
    import transformers
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    from fbila import LinFusion
except ImportError as error:
    raise SystemExit(f"{error}. The examples need: pip install fbila[demo]") from error

TINY = Path(__file__).parent / "tiny_sd"


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A text-to-image pipeline from a folder or the Hub, on the CPU and without safety checker.

    Raises:
        SystemExit: With one line, if there is no such pipeline or it has no UNet.
    """
    quiet()
    options = {"torch_dtype": dtype, "safety_checker": None}
    offline = not Path(name).is_dir() and not on_hub(name)
    if offline:
        options["local_files_only"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = AutoPipelineForText2Image.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        why = "no such folder, not in the cache, and the Hub cannot be reached"
        raise SystemExit(f"{name}: {why if offline else first_line(error)}") from error
    if getattr(pipeline, "unet", None) is None:
        raise SystemExit(f"{name} is a {type(pipeline).__name__}; LinFusion needs one with a UNet.")
    return pipeline


def load_linfusion(pipeline: DiffusionPipeline, weights: str | None = None) -> LinFusion:
    """Mounts LinFusion on the pipeline, with the weights given or else those found for it.

    Raises:
        SystemExit: With one line, if there are none or they do not fit.
    """
    # First what is on this disk, so that the Hub is asked only when it is needed.
    for offline in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return LinFusion.construct_for(
                    pipeline, pretrained_model_name_or_path=weights, local_files_only=offline
                )
        except ValueError as error:
            raise SystemExit(first_line(error)) from error
        except OSError as error:
            if not offline or not on_hub(weights or "Yuanshi/LinFusion-XL"):
                raise SystemExit(
                    f"No LinFusion weights: {first_line(error)} The Hub cannot be reached."
                ) from error
    raise AssertionError("the second attempt returns or raises")


def on_hub(name: str) -> bool:
    """Whether the Hub can be asked for a model now; False means that only a cache can have it.

    Raises:
        SystemExit: If the Hub answers that it has no such model, or not for this user.
    """
    if Path(name).is_dir():
        return False
    try:
        HfApi().model_info(name, timeout=10)
    except GatedRepoError as error:
        raise SystemExit(f"{name} is gated: accept its licence on the Hub and log in.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SystemExit(f"{name} is neither a folder nor a model on the Hub.") from error
    # Whatever else goes wrong on the way (which library's error it is depends on the version), the
    # cache may still have the model.
    except Exception:
        return False
    return True


def require_device(name: str) -> None:
    """Looks whether PyTorch has a device.

    Raises:
        SystemExit: With one line, if it has not.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {name}: {first_line(error)}") from error


def quiet() -> None:
    """Leaves the terminal to the example's own words."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
