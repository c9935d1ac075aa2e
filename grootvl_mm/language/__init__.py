"""GrootL, the paper's language model: Mamba with a tree over the prompt, for Hugging Face's transformers.

Importing the package registers ``model_type="grootl"`` with ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM``.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "grootvl_mm.language needs transformers, which is not installed: pip install 'grootvl_mm[language]'"
    ) from error

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from grootvl_mm.language.configuration import GrootLConfig
from grootvl_mm.language.mixer import GrootLMixer
from grootvl_mm.language.modeling import (
    GrootLBlock,
    GrootLCausalLMOutput,
    GrootLForCausalLM,
    GrootLModel,
    GrootLModelOutput,
    GrootLPreTrainedModel,
)

AutoConfig.register(GrootLConfig.model_type, GrootLConfig, exist_ok=True)
AutoModel.register(GrootLConfig, GrootLModel, exist_ok=True)
AutoModelForCausalLM.register(GrootLConfig, GrootLForCausalLM, exist_ok=True)

__all__ = [
    "GrootLBlock",
    "GrootLCausalLMOutput",
    "GrootLConfig",
    "GrootLForCausalLM",
    "GrootLMixer",
    "GrootLModel",
    "GrootLModelOutput",
    "GrootLPreTrainedModel",
]
