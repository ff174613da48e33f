"""Huge pages for large tables on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
_HUGE = 2 << 20
# Smaller tensors stay in the caches, page tables and all.
_LARGE_BYTES = 8 << 20


def advise_huge_pages(table: Tensor, *, collapse: bool = True) -> bool:
    """Asks the kernel to back a table's memory with huge pages.

    Lookups in a table far larger than the caches spend most of their time finding pages; with
    2 MB pages there are 512 times fewer. Values, addresses and everything else about the tensor
    stay as they are. Where the system decides about huge pages itself
    (``/sys/kernel/mm/transparent_hugepage/enabled`` is ``always`` or ``never``) nothing changes.

    Args:
        table: A contiguous CPU tensor. Best right after ``torch.empty``, before it is filled.
        collapse: Also copy pages that already hold values into huge ones, now (Linux 6.1 and
            later; 512 MB took 1.8 s on a busy machine). Untouched memory becomes resident by this.

    Returns:
        Whether the kernel took the advice. False on other systems, on other devices, and for
        memory that holds no whole huge page.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if not table.is_contiguous():
        raise ValueError("huge pages are for contiguous tensors")
    if table.device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    begin = -(-table.data_ptr() // _HUGE) * _HUGE
    end = (table.data_ptr() + table.numel() * table.element_size()) // _HUGE * _HUGE
    if end <= begin:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(begin, end - begin, _MADV_HUGEPAGE) != 0:
        return False
    if collapse:
        # An old kernel refuses; the advice for pages to come stands.
        madvise(begin, end - begin, _MADV_COLLAPSE)
    return True


def empty_table(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """``torch.empty``, on huge pages where it is a large CPU tensor.

    What this package allocates for tables and optimizer states comes from here. The environment
    variable ``AMTL_HUGE_PAGES=0`` turns the advice off.

    Args:
        *shape: Of the tensor.
        dtype: Of the tensor.
        device: Where it lies.

    Returns:
        A tensor that nobody has written to.
    """
    table = torch.empty(shape, dtype=dtype, device=device)
    large = table.numel() * table.element_size() >= _LARGE_BYTES
    if large and os.environ.get("AMTL_HUGE_PAGES", "1") != "0":
        advise_huge_pages(table, collapse=False)
    return table
