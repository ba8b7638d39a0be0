"""minillm: build a large language model, lesson by lesson, and keep it.

The public names, by hand; each comes from the module of one lesson, and is imported when first asked for.
"""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data import load_corpus
    from .model import PRESETS, MiniLLM, ModelConfig
    from .sampling import GenerationConfig, Generator
    from .tales import TaleWorld
    from .tokenizer import BPETokenizer, CharTokenizer
    from .training import TrainConfig, train

__version__ = "0.1.0"

HOME = {"TaleWorld": "tales", "BPETokenizer": "tokenizer", "CharTokenizer": "tokenizer", "load_corpus": "data",
        "MiniLLM": "model", "ModelConfig": "model", "PRESETS": "model", "TrainConfig": "training", "train": "training",
        "Generator": "sampling", "GenerationConfig": "sampling"}
__all__ = ["TaleWorld", "BPETokenizer", "CharTokenizer", "load_corpus", "MiniLLM", "ModelConfig", "PRESETS",
           "TrainConfig", "train", "Generator", "GenerationConfig", "load"]


def __getattr__(name: str):
    if name in HOME: return getattr(import_module(f".{HOME[name]}", __name__), name)
    raise AttributeError(f"module 'minillm' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]: return [*__all__, "__version__"]


def load(name_or_path: str, device: str = "auto", dtype: str = "auto") -> "Generator":
    """A `Generator` (with `.model` and `.tokenizer`) from whatever is given: a packaged model's name, a run, a saved
    model's folder, a folder in Hugging Face's format, or a hub id such as "HuggingFaceTB/SmolLM2-135M".

    `device` is "auto", "cpu", "cuda" or "mps"; `dtype` "auto" keeps the type that the weights were saved in (float32 on
    a CPU). A name or folder that is none of these raises FileNotFoundError, which lists the packaged models.
    """
    from .interop import open_model
    from .sampling import Generator
    model, tokenizer, _ = open_model(name_or_path, device=device, dtype=dtype)
    return Generator(model, tokenizer)
