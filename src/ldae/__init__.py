"""Latent Diffusion Autoencoders for 3D brain MRI."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LDAE", "__version__"]


def __getattr__(name: str) -> Any:
    # torch and monai take seconds to import: `ldae --help` must not wait for them.
    if name == "LDAE":
        from ldae.pipeline import LDAE

        return LDAE
    raise AttributeError(f"module 'ldae' has no attribute {name!r}")
