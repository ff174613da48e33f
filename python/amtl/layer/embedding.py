"""`AMTLEmbedding` and `AMTLEmbeddingBag`: drop-in tables whose rows learn their own width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from amtl.layer.fusing import FusedOptimizer
from amtl.layer.graphs import record
from amtl.layer.sharing import SharedRows
from amtl.layer.table import AMTLTable


class AMTLEmbedding(AMTLTable):
    """nn.Embedding whose rows learn their own width under one memory budget.

    Arguments up to `dtype` are those of nn.Embedding, in its order; the output has its shape,
    `indices.shape + [D]`, with zeros beyond each row's size. It is no subclass of nn.Embedding:
    what looks for `isinstance(m, nn.Embedding)` passes it by, rather than take its weight for all.

    In the search phase `out = m_i * W[i]`, where the mask m_i keeps the first k_i columns (paper,
    section 3) and k_i follows from the row's training count through `amtl.layer.sizes`. The mask
    gradient is straight-through, over masked columns too. The first forward after an optimizer step
    costs O(G * D) for the sizes of G groups (in training with noise, G * Q more) beside the lookup;
    frozen, the lookup alone. `weight` is what learns, unmasked until it is frozen: a model that
    scores by the table itself takes `layer(torch.arange(N))`, or freezes first.
    `torch.compile(fullgraph=True)` traces both phases, one graph for all steps.

    Args:
        num_embeddings: N. embedding_dim: D >= 1.
        padding_idx: a row without gradient. max_norm, norm_type: rows are scaled in place to at
            most this norm when looked up (all D columns of them), before any rounding to few bits.
        scale_grad_by_freq: refused.
        sparse: row gradients as sparse COO; False gives dense ones, for any optimizer.
        _weight: initial table [N, D]. _freeze: the table does not train.
        counts: int64 [N], training count of each row: `torch.bincount(indices, minlength=N)`.
        field_sizes: rows per field if the table holds several; one budget over all of them.
        row_features: [N, E], features that sizes may depend on beside the count. Every row is then
            a group of its own, and the size head costs O(N) a step.
        shared_rows: where rows of size 0 are looked up, gradients included: a row for each field
            (its out-of-vocabulary row), or "rarest" for the row of least count of each field. None
            or "zero": they give zeros. For the size rule such a row counts the lookups that land
            on it. The padding row never shares.
        fused_optimizer: what updates the table within the backward, so that no gradient of it is
            ever stored: a class of `amtl_kernels.optim`, or a `functools.partial` of one; see
            `fuse`. None: gradients, for any optimizer.
        **options: see `SearchOptions`.

    Raises:
        ValueError: an argument out of range, or a budget that the smallest size cannot meet.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        counts: object = None,
        field_sizes: Sequence[int] | None = None,
        row_features: Tensor | None = None,
        shared_rows: SharedRows = None,
        fused_optimizer: FusedOptimizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            not _freeze,
            device,
            dtype,
            counts,
            field_sizes,
            row_features,
            shared_rows,
            options,
        )
        self.fuse(fused_optimizer)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        counts: object,
        field_sizes: Sequence[int] | None = None,
        row_features: Tensor | None = None,
        shared_rows: SharedRows = None,
        **options: Any,
    ) -> AMTLEmbedding:
        """A layer around a trained table [N, D]; `freeze=True` keeps its weights from training."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be [N, D], got shape {tuple(embeddings.shape)}")
        rows, dim = embeddings.shape
        return cls(
            rows,
            dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            embeddings,
            freeze,
            counts=counts,
            field_sizes=field_sizes,
            row_features=row_features,
            shared_rows=shared_rows,
            **options,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up.

        Args:
            input: int32 or int64, any shape.

        Returns:
            `input.shape + [D]`.

        Raises:
            IndexError: an index is out of range (`bounds_check="raise"`).
        """
        if isinstance(input, Proxy):
            return record(self, "forward", input, input)
        try:
            return self._embed(input)
        except IndexError as error:
            raise self._named(error) from None


class AMTLEmbeddingBag(AMTLTable):
    """nn.EmbeddingBag whose rows learn their own width under one memory budget.

    Arguments up to `dtype` are those of nn.EmbeddingBag, in its order; it is no subclass of it.

    Args:
        num_embeddings: N. embedding_dim: D >= 1.
        mode: "sum" or "mean"; "max" is refused.
        include_last_offset: offsets end with the end of the last bag.
        padding_idx: a row that counts for nothing.
        max_norm, norm_type, scale_grad_by_freq, sparse, _weight, counts, field_sizes,
            row_features, shared_rows, fused_optimizer, **options: as in `AMTLEmbedding`.

    Raises:
        ValueError: an argument out of range, or a budget that the smallest size cannot meet.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        counts: object = None,
        field_sizes: Sequence[int] | None = None,
        row_features: Tensor | None = None,
        shared_rows: SharedRows = None,
        fused_optimizer: FusedOptimizer | None = None,
        _freeze: bool = False,
        **options: Any,
    ) -> None:
        if mode not in ("sum", "mean"):
            raise ValueError(
                f"mode must be 'sum' or 'mean', got {mode!r}. The maximum over masked rows would "
                "compare kept values with the zeros of shorter rows."
            )
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            not _freeze,
            device,
            dtype,
            counts,
            field_sizes,
            row_features,
            shared_rows,
            options,
        )
        self.fuse(fused_optimizer)
        self.mode = mode
        self.include_last_offset = include_last_offset

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        counts: object,
        field_sizes: Sequence[int] | None = None,
        row_features: Tensor | None = None,
        shared_rows: SharedRows = None,
        **options: Any,
    ) -> AMTLEmbeddingBag:
        """A layer around a trained table [N, D]; `freeze=True` keeps its weights from training."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be [N, D], got shape {tuple(embeddings.shape)}")
        rows, dim = embeddings.shape
        return cls(
            rows,
            dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            embeddings,
            include_last_offset,
            padding_idx,
            counts=counts,
            field_sizes=field_sizes,
            row_features=row_features,
            shared_rows=shared_rows,
            _freeze=freeze,
            **options,
        )

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look rows up and pool them by bag.

        Args:
            input: int32 or int64, [L] with offsets, or [B, l] without, of bags of several lengths
                as a nested tensor (`layout=torch.jagged`).
            offsets: [B] (or [B + 1] with include_last_offset), first position of each bag.
            per_sample_weights: like `input`, type of the table; mode "sum" only.

        Returns:
            [B, D]; empty bags are zero.

        Raises:
            IndexError: an index is out of range (`bounds_check="raise"`).
            ValueError: shapes, types or devices do not fit.
        """
        if isinstance(input, Proxy):
            return record(self, "forward", input, input, offsets, per_sample_weights)
        last = self.include_last_offset
        if isinstance(input, Tensor) and input.layout == torch.jagged:
            bags: Any = input
            input, offsets, last = bags.values().reshape(-1), bags.offsets(), True
            if per_sample_weights is not None:
                if per_sample_weights.layout != torch.jagged:
                    raise ValueError("per_sample_weights must be nested, as the input is")
                per_sample_weights = per_sample_weights.values().reshape(-1)
        try:
            return self._pool(input, offsets, per_sample_weights, self.mode, last)
        except IndexError as error:
            raise self._named(error) from None

    def _configure(self, config: Mapping[str, Any]) -> None:
        self.mode = config["mode"]
        self.include_last_offset = config["include_last_offset"]

    def config(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able."""
        return {
            **super().config(),
            "mode": self.mode,
            "include_last_offset": self.include_last_offset,
        }

    def extra_repr(self) -> str:
        """As nn.EmbeddingBag, then the phase, the budget and what is not default."""
        return f"{super().extra_repr()}, mode={self.mode!r}"
