"""What another run has learned, for one that goes on from it: rows, the rest of the model, rates.

Rows are matched by field and value, and keep what their optimizer knows of them, so that values
that were trained move on in small steps and new ones in large steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.data.labels import labelled
from amtl.data.registry import Source, default_batch_size
from amtl.errors import UserError
from amtl.run import methods
from amtl.run.config import OWN, TrainConfig
from amtl.run.model import ClickModel


class Earlier:
    """The best model of a run, all rows at full width.

    Args:
        folder: of the run.
        config: its settings, what a race settled included.
        encoder: its fields and vocabularies as fitted.
        model: in their numbers.
        best: its checkpoint.

    Attributes:
        weight: its embeddings, float32 `[N, D]`, zeros where a row kept less.
        val_auc: of its own validation.

    Raises:
        UserError: it is a run of a method of the field.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        encoder: Encoder,
        model: ClickModel,
        best: Mapping[str, Any],
    ) -> None:
        self.folder, self.config, self.encoder = folder, config, encoder
        self._matched: tuple[Encoder, tuple[Tensor, Tensor]] | None = None
        if self.config.method not in OWN:
            raise UserError(
                f"--warm-start {folder}: a run of --method {self.config.method} is there to be "
                f"compared with; one of {', '.join(OWN)} can be gone on from"
            )
        if best.get("row_map") is not None:
            self.encoder.renumber(best["row_map"])
        table = model.table
        self._squares: Tensor | None = None
        if methods.is_adaptive(table):
            self._squares = table.row_squares()  # type: ignore[operator]
        optimizer = methods.table_optimizer(
            self.config.table_optimizer, methods.table_parameters(table), self.config.table_lr
        )
        if best.get("table_optimizer"):
            optimizer.load_state_dict(best["table_optimizer"])
        if methods.is_adaptive(table) and methods.is_frozen(table):
            table.thaw(optimizer)  # type: ignore[operator]
        parameter = methods.table_parameters(table)[0]
        self.weight = parameter.detach().float()
        self.val_auc: float = best["record"]["val_auc"]
        self._row_state: dict[str, Any] = dict(optimizer.state[parameter])
        self._dense = [p.detach() for p in model.dense_parameters()]
        self._dense_state: dict[str, Any] = best.get("dense_optimizer") or {}

    def continued(self, config: TrainConfig, source: Source) -> TrainConfig:
        """Settings for what of the data is new, if they begin with the rows that the run had.

        Raises:
            UserError: there are no rows behind those, or the data are the same ones, split
                otherwise: validation would hold what was learned by heart.
        """
        # What is added to the MLP is as it was while it learned; another backbone begins anew.
        means = self.config.backbone_means or config.backbone != self.config.backbone
        config = replace(config, backbone_means=means)
        if self.encoder.labels is None:
            return config
        _, labels = labelled(source.frame, config.labelling)
        had, skipped = self.encoder.labels[0], self.config.skip_rows
        if not self.encoder.has_labels(labels[skipped : skipped + had]):
            return config
        if len(labels) > skipped + had:
            size = config.batch_size
            if size == default_batch_size(source.frame.height):
                size = default_batch_size(len(labels) - skipped - had)
            return replace(config, skip_rows=skipped + had, batch_size=size)
        for name in ("split", "split_seed", "copies_together"):
            if getattr(config, name) != getattr(self.config, name):
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"--warm-start {self.folder}: it was trained on the same rows with another "
                    f"{option}, so validation would hold rows that it knows: leave {option} out"
                )
        return replace(config, skip_rows=skipped)

    def begin(
        self,
        config: TrainConfig,
        encoder: Encoder,
        model: ClickModel,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        settle: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        """Puts what fits into a fresh model.

        Args:
            config: of the run that goes on.
            encoder: its fields, and values old and new.
            model: its table is dense still.
            optimizers: of the table and of all else.
            settle: fixes the table's sizes, if they are to be, and takes its optimizer along.

        Raises:
            UserError: rows are of another width.
        """
        if config.dim != self.config.dim:
            raise UserError(
                f"--warm-start {self.folder}: its width is {self.config.dim}; use --dim "
                f"{self.config.dim}"
            )
        ours, theirs = self.matched(encoder)
        table, (of_table, of_dense) = model.table, optimizers
        parameter = methods.table_parameters(table)[0]
        with torch.no_grad():
            parameter[ours] = self.weight[theirs].to(parameter.dtype)
        if config.table_optimizer == self.config.table_optimizer:
            self._go_on(of_table, parameter, ours, theirs)
        settle(of_table)
        if self._squares is not None and methods.few_bits(table):
            squares = self._squares.new_zeros(encoder.num_rows)
            squares[ours] = self._squares[theirs]
            table.round_by(squares)  # type: ignore[operator]
        if self.fits(model):
            with torch.no_grad():
                for mine, their in zip(model.dense_parameters(), self._dense, strict=True):
                    mine.copy_(their)
            if self._dense_state:
                of_dense.load_state_dict(self._dense_state)

    def fits(self, model: ClickModel) -> bool:
        """Whether all but the table goes on, too."""
        return [p.shape for p in model.dense_parameters()] == [p.shape for p in self._dense]

    def _go_on(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        ours: Tensor,
        theirs: Tensor,
    ) -> None:
        """Gives rows the state that they had; the others have none, as in a fresh run."""
        for name, value in self._row_state.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == len(self.weight):
                state = value.new_zeros(len(parameter), *value.shape[1:])
                state[ours] = value[theirs]
                optimizer.state[parameter][name] = state
            else:
                optimizer.state[parameter][name] = value

    def matched(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        """Rows of a table of the same fields and their rows here, both int64, by value.

        Kept for the encoder that was asked for last: all learners of a run have one.
        """
        if self._matched is None or self._matched[0] is not encoder:
            self._matched = encoder, self._match(encoder)
        return self._matched[1]

    def _match(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        ours, theirs = [], []
        pairs = zip(encoder.vocabularies, self.encoder.vocabularies, strict=True)
        for f, (mine, known) in enumerate(pairs):
            rows = known.encode(mine.known()).long()
            local = torch.arange(mine.size)
            local = torch.cat([local[: mine.oov_row], local[mine.oov_row + 1 :]])
            hit = rows != known.oov_row
            local = torch.cat([local[hit], torch.tensor([mine.oov_row])])
            rows = torch.cat([rows[hit], torch.tensor([known.oov_row])])
            ours.append(encoder.field_rows(f)[local])
            theirs.append(self.encoder.field_rows(f)[rows])
        return torch.cat(ours), torch.cat(theirs)
