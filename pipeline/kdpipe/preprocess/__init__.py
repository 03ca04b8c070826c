"""A model's own deterministic way from prepared rows to its inputs."""

from kdpipe.preprocess.base import Preprocess, State, offers
from kdpipe.preprocess.image import ImageTensor
from kdpipe.preprocess.numeric import Standardize
from kdpipe.preprocess.text import PretrainedTokenizer, Tokenizer, Utf8Bytes

__all__ = [
    "ImageTensor",
    "Preprocess",
    "PretrainedTokenizer",
    "Standardize",
    "State",
    "Tokenizer",
    "Utf8Bytes",
    "offers",
]
