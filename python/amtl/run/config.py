"""Everything that decides a run, as one JSON-able record."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from amtl.errors import UserError

if TYPE_CHECKING:
    from amtl.data.labels import Labelling

BACKBONES = ("dnn", "deepfm", "dcn", "xdeepfm", "autoint", "din", "widedeep")
"""See `amtl.run.backbones`."""


OWN = ("amtl", "rule", "fixed")
"""The product's own methods; the others are there to be compared with."""

BITS = ("auto", "32", "16", "8", "4", "2")

TABLE_RATES = {"adagrad": 1.0, "rowwise_adagrad": 1.0, "adam": 6e-2, "sgd": 6e-2}
"""Learning rates of a table by its optimizer."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_budget(text: str) -> dict[str, Any]:
    """`budget` or `budget_bytes` of what was typed: a share (`0.1`, `10%`), or bytes (`2MB`).

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([kmg]?i?)b", text.strip().lower())
    try:
        if text.strip().endswith("%"):
            return {"budget": float(text.strip()[:-1]) / 100}
        if found is None:
            return {"budget": float(text)}
        return {"budget_bytes": round(float(found[1]) * _UNITS[found[2]])}
    except (ValueError, KeyError):
        raise UserError(
            f"--budget {text!r}: a share such as 0.1 or 10%, or bytes such as 500kB or 2MB, is "
            "needed"
        ) from None


def parse_names(option: str, text: str | None, known: Collection[str] = ()) -> list[str]:
    """The names in what was typed after `option`, separated by commas; none where nothing was.

    All of it is one name if that is `known`, whatever commas it holds; a known name keeps the
    spaces around it.

    Raises:
        UserError: a name is empty.
    """
    if text is None:
        return []
    names = [text] if text in known else text.split(",")
    names = [name if name in known else name.strip() for name in names]
    if not all(names):
        raise UserError(
            f"{option} {text!r} holds an empty name: write names with one comma between, such as "
            "a,b, or leave the option out"
        )
    return names


def _of_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as version 1 meant them: other defaults, freezing by a share of the epochs."""
    options: dict[str, Any] = {"min_dim": 1, "init_exponent": 0.5, "shared_rows": None}
    if content.get("method", "amtl") == "amtl":
        options["parametrization"] = "ordinal"
    options |= content.get("table_options", {})
    return {**content, "table_options": options, "freeze_at": None, "race": False}


@dataclass
class TrainConfig:
    """Settings of a training run; two runs with equal settings give equal results on one CPU.

    Attributes:
        data: path or named set.
        label: label column.
        label_threshold: numbers of at least this are positive; None if labels are 0 and 1.
        label_positive: the value that is positive, as text; None if that needs no saying.
        label_missing: `drop` leaves rows without a label out, `negative` counts them as negative;
            None: there are none.
        weight: column of what each row counts in training and in scores, see
            `amtl.data.weights.weighed`; None: all the same.
        negatives: negative rows to draw for a file of positive ones, `USER:ITEM:COUNT`, see
            `amtl.data.negatives`; None: the file has labels.
        fields: columns used, and parts of moments such as `when.hour`, see `amtl.data.calendar`;
            empty for all but label, split and weight column, and what labels follow of their parts.
        drop: of these, columns and parts that are not used, where `fields` is empty.
        numeric: column to `bucket`, `standardise` or `categorical`.
        default_numeric: treatment of other floating-point columns.
        values: whether numbers, whole ones of many values included, join their embeddings; see
            `amtl.data.scales`.
        separators: column to separator of multi-valued strings.
        min_count: values seen less often in training share the out-of-vocabulary row.
        split: `random`, `order:COLUMN` or `column:COLUMN`, see `amtl.data.splits.split_rows`.
        split_seed: of the random split, apart from `seed`, so that seeds share a test set.
        copies_together: whether copies of a row stay in one part of the random split, see
            `amtl.data.copies`.
        hides: whether values are taken as unseen in training as often as validation has unseen
            ones, see `amtl.run.unseen.Hiding`; None: what validation prefers where there is a race,
            else not.
        seed: of weights, batches and size noise.
        method: `amtl`, `rule`, `fixed` or a peer, see `amtl.run.methods`.
        dim: full embedding width D.
        budget: stored bytes over those of N × D numbers of 32 bits.
        budget_bytes: the same as a number of bytes; `with_rows` makes `budget` of it.
        bits: of a stored number: `32`, `16`, `8`, `4`, `2`, or `auto` for what validation
            prefers, 4 where there is no race, and 32 for `fixed` and where sizes are learned.
        masters: False trains codes alone, of 16, 8, 4 or 2 bits, by `sgd` or `rowwise_adagrad`.
        freeze_at: step at which sizes are fixed; None leaves it to validation.
        table_options: more keyword arguments of the layer, or of the peer.
        warm_start: folder of a run whose fields, values and model to start from, or None.
        skip_rows: labelled rows at the start of the data that it had, and that are left out.
        backbone: what meets the embeddings beside the MLP, one of `BACKBONES`.
        backbone_means: whether it takes means over fields and their pairs; else sums.
        hidden: widths of the MLP.
        embedding_dropout: share of the embeddings' numbers zeroed in a training step; None:
            what validation prefers where there is a race, else none.
        embedding_decay: weight decay of the embeddings, `decay / 2 * sum(w^2)` in the loss, over
            all rows, those that a step does not look up too. It regularises most what is seen
            least, and costs a pass over the whole table every 16 steps, or more where that is
            large. None: what validation prefers where there is a race, else none; `amtl train`
            takes `amtl.run.contenders.DECAY` where nothing else is tried.
        distillation: share of each training label that is a better model's prediction; None: what
            validation prefers where there is a race, else none.
        init_std: deviation of initial embedding weights.
        batch_size: samples per step.
        epochs: at most so many.
        validations: so many an epoch, or lap of at most two million samples of a longer one, of
            the model as it would be stored. The best one by AUC minus log loss is kept.
        patience: validations in a row without a better one, after which training goes back to the
            best model, freezes its sizes and goes on with learning rates times `rate_drop`; from
            then on half as many, at least 2. With weight decay twice as many at first and as many
            from then on, that are no better than others at the same rates.
        rate_drop: what the learning rates of MLP and table are multiplied by at each such turn.
        rate_drops: so many turns; the next one ends training. With weight decay the last fifth of
            `epochs` has smaller rates in any case.
        race: whether candidates for what is left open here are tried at the start of training.
        compare: also train a table of full size and one of fixed width in the same bytes.
        lr: learning rate of the MLP (Adam).
        table_lr: learning rate of the embeddings; None: that of `TABLE_RATES`. Of a table that goes
            on from another run's it is a tenth.
        mask_lr: learning rate of the size parameters (Adam).
        table_optimizer: `adam`, `adagrad`, `rowwise_adagrad` or `sgd`, on touched rows only; None:
            `adagrad`, `rowwise_adagrad` without masters, and `adam` for methods of the field.
    """

    data: str
    label: str
    label_threshold: float | None = None
    label_positive: str | None = None
    label_missing: str | None = None
    weight: str | None = None
    negatives: str | None = None
    fields: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    numeric: dict[str, str] = field(default_factory=dict)
    default_numeric: str = "bucket"
    values: bool = True
    separators: dict[str, str] = field(default_factory=dict)
    min_count: int = 1
    split: str = "random"
    split_seed: int = 0
    copies_together: bool = True
    hides: bool | None = None
    seed: int = 0
    method: str = "amtl"
    dim: int = 16
    budget: float = 0.4
    budget_bytes: int | None = None
    bits: str = "auto"
    masters: bool = True
    freeze_at: int | None = None
    table_options: dict[str, Any] = field(default_factory=dict)
    warm_start: str | None = None
    skip_rows: int = 0
    backbone: str = "dnn"
    backbone_means: bool = True
    hidden: list[int] = field(default_factory=lambda: [128, 64])
    embedding_dropout: float | None = None
    embedding_decay: float | None = None
    distillation: float | None = None
    init_std: float = 0.01
    batch_size: int = 8192
    epochs: int = 60
    validations: int = 4
    patience: int = 8
    rate_drop: float = 0.1
    rate_drops: int = 2
    race: bool = True
    compare: bool = False
    lr: float = 2e-3
    table_lr: float = None  # type: ignore[assignment]  # settled below
    mask_lr: float = 1e-2
    table_optimizer: str = None  # type: ignore[assignment]  # settled below

    def __post_init__(self) -> None:
        if self.table_optimizer is None:
            self.table_optimizer = self._serving_optimizer()
        if self.table_lr is None:
            self.table_lr = TABLE_RATES.get(self.table_optimizer, TABLE_RATES["adam"])
        for name in (
            *("dim", "batch_size", "epochs", "validations", "patience", "min_count"),
            *("lr", "table_lr", "mask_lr", "rate_drop"),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {value:g}")
        if self.weight is not None:
            self._require_weight(self.weight)
        if self.backbone not in BACKBONES:
            raise UserError(f"--backbone {self.backbone!r}: choose one of {', '.join(BACKBONES)}")
        if self.method not in OWN:
            self.race = False
            if self.freeze_at is not None or self.warm_start is not None:
                raise UserError(f"--freeze-at and --warm-start have no meaning for {self.method}")
            if not self.masters:
                raise UserError(f"--no-masters has no meaning for {self.method}")
            if self.bits not in ("auto", "32"):
                raise UserError(
                    f"--bits is a setting of the product's own methods, not of {self.method}; what "
                    "that one has is set by --option NAME=VALUE"
                )
        if self.bits not in BITS:
            raise UserError(f"--bits must be one of {', '.join(BITS)}, not {self.bits!r}")
        if self.bits not in ("auto", "32") and self.method == "amtl" and self._learns_sizes():
            raise UserError(
                f"--bits {self.bits} needs sizes that are settled before training, as "
                "--parametrization rule has them; with others, --bits 32"
            )
        if not self.masters:
            if self.bits in ("auto", "32"):
                raise UserError(
                    f"--no-masters trains codes alone: choose --bits 16, 8, 4 or 2, not {self.bits}"
                )
            if self.table_optimizer not in ("sgd", "rowwise_adagrad"):
                raise UserError(
                    f"--no-masters goes with --table-optimizer rowwise_adagrad or sgd: the state "
                    f"of {self.table_optimizer} is larger than the masters that are saved"
                )
        if not 0 < self.budget <= 1:
            raise UserError(
                f"--budget must be above 0 and at most 1, not {self.budget:g}: a share such as 0.1 "
                "or 10%, or bytes such as 500kB"
            )
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise UserError(f"--budget must be at least a byte, not {self.budget_bytes}")
        if self.embedding_dropout is not None and not 0 <= self.embedding_dropout < 1:
            raise UserError(
                f"--embedding-dropout must be from 0 up to (not including) 1, "
                f"not {self.embedding_dropout:g}"
            )
        decay = self.embedding_decay or 0.0
        if not (math.isfinite(decay) and decay >= 0):
            raise UserError(f"--embedding-decay must be a number from 0 on, not {decay:g}")
        if decay and not self.may_decay:
            raise UserError("--embedding-decay needs the numbers that --no-masters does without")
        if self.distillation is not None and not 0 <= self.distillation <= 1:
            raise UserError(f"--distillation must be from 0 to 1, not {self.distillation:g}")
        if self.freeze_at is not None and self.freeze_at < 0:
            raise UserError(f"--freeze-at is a number of steps, not {self.freeze_at}")

    def _require_weight(self, weight: str) -> None:
        if weight == self.label:
            raise UserError(f"--weight {weight!r} is the label: name the column that weighs rows")
        taken = {"fields": self.fields, "numeric": self.numeric, "multi": self.separators}
        for option, names in taken.items():
            if weight in names:
                raise UserError(
                    f"--{option} names {weight!r}, which weighs rows and is no field: leave one out"
                )
        if self.split in (f"order:{weight}", f"column:{weight}"):
            raise UserError(f"--split {self.split} goes by what weighs rows: leave one out")
        if self.negatives is not None:
            raise UserError(
                "--weight has no meaning with --negatives, for rows that are drawn have no weight "
                "of their own: leave one out"
            )

    def with_rows(self, rows: int) -> TrainConfig:
        """Settings whose budget is a share of the bytes of `rows` rows."""
        if self.budget_bytes is None:
            return self
        share = self.budget_bytes / (max(1, rows) * self.dim * 4)
        return replace(self, budget=min(1.0, share), budget_bytes=None)

    @property
    def labelling(self) -> Labelling:
        """What the labels are: arguments of `amtl.data.labels.read_labels` after the data."""
        return self.label, self.label_threshold, self.label_positive, self.label_missing

    @property
    def effective_budget(self) -> float | None:
        """The budget that holds: None for `fixed`, and where the layer is given none."""
        if self.method == "fixed":
            return None
        return self.table_options.get("budget", self.budget)

    @property
    def may_decay(self) -> bool:
        """Whether embeddings can have weight decay, which codes alone cannot."""
        return self.masters

    @property
    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments of the layer, or of the peer."""
        if self.method not in OWN:
            return dict(self.table_options)
        masters = {} if self.masters else {"masters": False}
        return {"bits": self.number_bits, **masters, **self.table_options}

    @property
    def number_bits(self) -> int | None:
        """Bits of a stored number where nothing else was chosen; None for 32."""
        if self.bits == "auto":
            return (8 if self.dim % 2 else 4) if self.raced_bits else None
        return None if self.bits == "32" else int(self.bits)

    @property
    def raced_bits(self) -> bool:
        """Whether validation may choose the bits: sizes must be settled for training to round."""
        sized = self.method in OWN and self.method != "fixed"
        return self.bits == "auto" and sized and not self._learns_sizes()

    def _serving_optimizer(self) -> str:
        if self.method not in OWN:
            return "adam"
        return "adagrad" if self.masters else "rowwise_adagrad"

    def _learns_sizes(self) -> bool:
        options = self.table_options
        learned = options.get("parametrization", "rule") != "rule" or options.get("size_noise")
        return bool(learned) or self.freeze_at is not None

    def to_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; settings unknown to this version are refused."""
        if "race" not in content:
            content = _of_version_1(content)
        # Before there were bits, numbers had 32, copies went anywhere, and backbones had sums.
        before = {"bits": "32", "copies_together": False, "backbone_means": False}
        content = {**before, **content}
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise UserError(f"unknown settings {', '.join(unknown)}: written by a newer amtl?")
        return cls(**content)
