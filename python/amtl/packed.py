"""A whole trained model in one safetensors file: tiers, MLP and vocabularies, no pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import amtl_kernels
from amtl import methods
from amtl.config import TrainConfig
from amtl.data.encoding import Encoder
from amtl.errors import UserError
from amtl.model import ClickModel
from amtl.storage import load_tensors, save_tensors
from amtl.trained import Trained, load_run

KIND, VERSION = "amtl-model", 1


class PackedTable(nn.Module):
    """Size tiers for serving: a lookup reads the kept numbers of a row and nothing else.

    Args:
        blocks: tier `c` as `[rows, width_c]`.
        dim: width of the output; columns beyond a row's width are zero.
        bags: whether it is called with offsets and averages each bag.
    """

    def __init__(self, blocks: Sequence[Tensor], dim: int, bags: bool) -> None:
        super().__init__()
        self.blocks = nn.ParameterList([nn.Parameter(b, requires_grad=False) for b in blocks])
        ends = torch.cumsum(torch.tensor([b.shape[0] for b in blocks]), 0)
        self.tier_ends = [int(e) for e in ends]
        self.dim = dim
        self.bags = bags

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Rows of the table: `indices.shape + [dim]`, or `[bags, dim]` averaged with offsets."""
        if self.bags:
            return amtl_kernels.tiered_embedding_bag(
                list(self.blocks),
                self.tier_ends,
                indices,
                offsets,
                embedding_dim=self.dim,
                mode="mean",
            )
        return amtl_kernels.tiered_embedding(
            list(self.blocks), self.tier_ends, indices, embedding_dim=self.dim
        )

    def table_parameters(self) -> list[nn.Parameter]:
        """The tiers."""
        return list(self.blocks)

    def mask_parameters(self) -> list[nn.Parameter]:
        """None: sizes are fixed."""
        return []

    phase = "frozen"

    def row_dims(self) -> Tensor:
        """Stored width of each row, int32 `[N]`."""
        return methods.row_widths(self).to(torch.int32)

    def stored_bytes(self) -> int:
        """Bytes of the tiers."""
        return sum(b.numel() * b.element_size() for b in self.blocks)

    def dense_bytes(self) -> int:
        """Bytes of a full table."""
        return self.tier_ends[-1] * self.dim * self.blocks[0].element_size()


def pack_run(folder: Path, out: Path, dtype: torch.dtype | None = None) -> Trained:
    """Writes the best model of a run to one file, atomically; returns it as loaded from there.

    Args:
        folder: a finished or stopped run.
        out: the file.
        dtype: of the stored embedding values; by default as trained, which keeps predictions
            bit for bit.
    """
    trained = load_run(folder)
    table = trained.model.table
    if not methods.is_frozen(table):
        raise UserError(
            f"{folder} stopped before its sizes were frozen; go on with "
            f"amtl train --resume --out {folder}"
        )
    encoder_tensors, encoder_meta = trained.encoder.to_tensors()
    tensors = {f"encoder.{k}": v for k, v in encoder_tensors.items()}
    tensors |= {f"mlp.{k}": v for k, v in trained.model.mlp.state_dict().items()}
    for c, block in enumerate(methods.table_parameters(table)):
        tensors[f"table.{c}"] = block.detach().to(dtype or block.dtype)
    metrics = {
        k: v for k, v in (trained.metrics or {}).items() if k not in ("history", "config", "sizes")
    }
    meta = {
        "config": trained.config.to_dict(),
        "encoder": encoder_meta,
        "metrics": metrics,
        "bags": any(f.kind == "bag" for f in trained.encoder.fields),
        "tiers": len(methods.table_parameters(table)),
    }
    save_tensors(out, KIND, VERSION, tensors, meta)
    return load_packed(out)


def load_packed(path: Path) -> Trained:
    """Loads a packed model, memory-mapped.

    Raises:
        UserError: if the file is missing, damaged or newer than this version reads.
    """
    tensors, meta = load_tensors(path, KIND, VERSION)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        config = TrainConfig.from_dict(meta["config"])
        encoder = Encoder.from_tensors(part("encoder."), meta["encoder"])
        blocks = [tensors[f"table.{c}"] for c in range(meta["tiers"])]
        table = PackedTable(blocks, config.dim, meta["bags"])
        model = ClickModel(
            table, len(encoder.fields), config.dim, len(encoder.dense_fields), config.hidden
        )
        model.mlp.load_state_dict(part("mlp."))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    model.eval()
    return Trained(config, encoder, model, meta["metrics"])


def load_any(path: Path) -> Trained:
    """Loads a run folder or a packed file."""
    return load_run(path) if path.is_dir() else load_packed(path)


def size_table(trained: Trained) -> list[dict[str, Any]]:
    """Rows, bytes and sizes per field, for `amtl inspect`."""
    widths = methods.row_widths(trained.model.table)
    itemsize = methods.table_parameters(trained.model.table)[0].element_size()
    counts = trained.encoder.counts()
    result = []
    for f, name in enumerate(trained.encoder.names):
        rows = trained.encoder.field_rows(f)
        w, c = widths[rows].double(), counts[rows].double()
        result.append(
            {
                "field": name,
                "kind": trained.encoder.fields[f].kind,
                "rows": len(rows),
                "lookups": int(c.sum()),
                "mean_size": float(w.mean()),
                "mean_size_of_lookups": float((w * c).sum() / c.sum().clamp(min=1)),
                "min_size": int(w.min()),
                "max_size": int(w.max()),
                "bytes": int(w.sum()) * itemsize,
            }
        )
    return result
