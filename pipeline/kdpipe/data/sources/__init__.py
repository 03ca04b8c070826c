"""Where rows come from: a `Source` yields Arrow record batches; nothing is held in memory whole."""

from kdpipe.data.sources.arrays import NumPy
from kdpipe.data.sources.base import Source
from kdpipe.data.sources.digits import Digits, write_digits
from kdpipe.data.sources.hugging_face import HuggingFace
from kdpipe.data.sources.images import ImageFolder
from kdpipe.data.sources.synthetic import Synthetic
from kdpipe.data.sources.tables import Table
from kdpipe.data.sources.text import TextFile

__all__ = ["Digits", "HuggingFace", "ImageFolder", "NumPy", "Source", "Synthetic", "Table", "TextFile", "write_digits"]
