"""Files: layers, models and runs in one checked format.

`files` writes whole files or none, `tensors` is the format, `packed` has layers and models in it.
"""

from amtl.store.packed import PackedFile, open_packed, save
from amtl.store.tensors import PackedFileError, TensorFileError

__all__ = ["PackedFile", "PackedFileError", "TensorFileError", "open_packed", "save"]
