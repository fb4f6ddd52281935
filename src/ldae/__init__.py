"""Latent Diffusion Autoencoders for 3D brain MRI."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

__version__ = "0.1.0"
__all__ = ["LDAE", "__version__"]


def __getattr__(name: str) -> type:
    # torch and MONAI take seconds to import; `ldae --help` does not need them.
    if name == "LDAE":
        from ldae.pipeline import LDAE

        return LDAE
    raise AttributeError(f"module 'ldae' has no attribute {name!r}")
