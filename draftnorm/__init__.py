"""draftnorm: readable Llama/Mixtral decoding with draft-and-verify speculation on a Triton RMSNorm.

The names below are the public interface. They load on first use, so that `import draftnorm` and
`draftnorm --version` do not pay for importing torch.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

_HOME_OF = {
    "load_model": "draftnorm.model.checkpoint",
    "save_model": "draftnorm.model.checkpoint",
    "load_tokenizer": "draftnorm.model.tokenizer",
    "ModelConfig": "draftnorm.model.config",
    "generate": "draftnorm.decoding.generation",
    "speculate": "draftnorm.decoding.speculation",
    "SamplingConfig": "draftnorm.decoding.sampling",
    "rms_norm": "draftnorm.kernels.rms_norm",
}
__all__ = [*_HOME_OF, "__version__"]

# In a checkout the four folders lie beside this package, not inside it as in a wheel. An editable
# install cannot map a root package onto them, so the root of the checkout joins our search path.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "kernels").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'draftnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
