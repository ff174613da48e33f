"""One model in training: its optimizers, and when it is validated, frozen, slowed down and done.

Sizes meet the budget at every step, so the model at any step is a model of that size: it is
validated several times an epoch as it would be stored, and the best one is kept whatever the phase.
When validation has not improved for a while, training goes back to the best model: first to freeze
its sizes, then to go on with smaller learning rates, until that no longer helps either.

Nothing here touches a file or a screen.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amtl.data.encoded import EncodedData
from amtl.data.encoding import Encoder
from amtl.errors import UserError
from amtl.run import averaging, methods
from amtl.run.backbones import Interaction
from amtl.run.config import TrainConfig
from amtl.run.earlier import Earlier
from amtl.run.metrics import auc, calming, log_loss, score, score_error
from amtl.run.model import build_model, predict
from amtl.run.unseen import Hiding, fields_to_hide, settle_unseen
from amtl.store.dense import to_bytes, to_halves

_NEXT_TO_NOTHING, _LITTLE = 2e-5, 5e-4
"""In AUC minus log loss: far below what another seed changes; and what may be lost where it is less
than a standard error, as on a thousand rows a single pair that changes places."""

_AT_FULL_RATES = 2
"""Times the patience with weight decay, before rates fall: what values say together is learned
after a plateau, at full rates or never."""

_LAST = 0.8
"""Share of all epochs after which learning rates fall at the latest with weight decay, by which a
model may creep forward for all of them: smaller rates then gain more than all that came before.
Without decay few epochs are better spent at full rates."""

_BACK = 0.1
"""Of what a stage has lost, what it has to regain to be on its way back, and not to swing."""

_FAR = 0.02
"""In AUC minus log loss: a stage that lags by less may be a swing."""

_GOING_ON = 0.1
"""Of the learning rate, that of a table which was trained before: at the whole of it rows forget
more than they learn, from one day to the next."""

_TIMED_STEPS = 20_000
"""Steps per phase whose times are kept, so that checkpoints of long runs stay small."""

LAP = 2**21
"""Samples at most between two points at which a race compares. Settings that part after two million
samples need no epoch of a hundred million to be told apart."""


@dataclass
class Task:
    """Encoded data of a run.

    Attributes:
        encoder: fitted on the training split.
        train, val, test: the three splits.
        notes: what there is to say about the data.
        earlier: what training starts from, if not from nothing.
    """

    encoder: Encoder
    train: EncodedData
    val: EncodedData
    test: EncodedData
    notes: tuple[str, ...] = ()
    earlier: Earlier | None = None


class Learner:
    """Trains one model, step by step; learners of one task may share its data.

    Args:
        config: settings.
        task: encoded data.
        warm: is handed the fresh table, to put other weights into it.
        taught: probability of a click for every training sample, of which `config.distillation`
            is mixed into the labels.
        earlier: what it goes on from.

    Attributes:
        goes_on: whether its table was trained already; it is then validated before the first step.
        leaving: is told when `release` has let go of the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        warm: Callable[[nn.Module], None] | None = None,
        taught: Tensor | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        self.config = config
        self.task = task
        self.model = build_model(config, task.encoder)
        self.table = self.model.table
        self._hiding = Hiding(task.encoder, task.val) if config.hides else None
        self.steps_per_epoch = math.ceil(len(task.train) / config.batch_size)
        self.laps = max(1, math.ceil(len(task.train) / LAP))
        self.steps = 0
        self.stage = 0
        self.stale = 0
        self.finished = False
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.step_seconds: dict[str, list[float]] = {"search": [], "frozen": []}
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self._order: tuple[int, Tensor] | None = None
        self.taught = taught
        self.released = False
        self.leaving: Callable[[Learner], None] | None = None
        self._ended = False
        self.said: Tensor | None = None
        self._calmed = 1.0
        lap = math.ceil(self.steps_per_epoch / self.laps)
        self._average = averaging.Average(averaging.LAPS * lap)
        if warm is not None:
            warm(self.table)
        self.goes_on = earlier is not None
        if earlier is None and config.masters:
            # Of no optimizer yet: none is looked for.
            self._settle([])
        self._make_optimizers()
        if earlier is not None:
            optimizers = self.table_optimizer, self.dense_optimizer
            earlier.begin(config, task.encoder, self.model, optimizers, self._settle)
            self._set_rates()
        # What updates codes must be there before they are all that is left.
        self._settle(self.table_optimizer)
        # Each goes on by itself, so that it does not matter what is trained in between.
        self.rng = torch.get_rng_state()

    def _make_optimizers(self) -> None:
        config = self.config
        self.table_optimizer = methods.table_optimizer(
            config.table_optimizer,
            methods.table_parameters(self.table),
            config.table_lr,
            config.embedding_decay or 0.0,
        )
        methods.fuse(self.table, self.table_optimizer)
        self.dense_optimizer = torch.optim.Adam(
            self.model.dense_parameters(), config.lr, fused=True
        )
        masks = methods.mask_parameters(self.table)
        self.mask_optimizer = torch.optim.Adam(masks, config.mask_lr) if masks else None
        self._set_rates()

    @property
    def may_hide(self) -> bool:
        """Whether validation has unseen values that training could have, too."""
        return bool(fields_to_hide(self.task.encoder, self.task.val))

    def _set_rates(self) -> None:
        """Learning rates of the present stage; those of a size search don't fall."""
        scale = self.config.rate_drop**self.stage
        rates = [
            (self.table_optimizer, self.config.table_lr * (_GOING_ON if self.goes_on else 1.0)),
            (self.dense_optimizer, self.config.lr),
        ]
        if self.mask_optimizer is not None and self.frozen:
            rates.append((self.mask_optimizer, self.config.mask_lr))
        for optimizer, rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale

    @property
    def frozen(self) -> bool:
        """Whether sizes are fixed."""
        return methods.is_frozen(self.table)

    @property
    def phase(self) -> str:
        """`search`, `frozen`, or empty for a table whose rows are equally wide."""
        if self.config.method == "fixed":
            return ""
        return "frozen" if self.frozen else "search"

    @property
    def epochs(self) -> float:
        """Passes over the training split so far."""
        return self.steps / self.steps_per_epoch

    def lap_end(self, laps: int) -> int:
        """Steps from the start to the end of so many laps; a short epoch is one lap."""
        return math.ceil(laps * self.steps_per_epoch / self.laps)

    def step(self) -> tuple[float, int]:
        """Takes one step, and validates where one is due; returns the loss and the samples.

        Raises:
            UserError: the loss is no longer finite.
        """
        config = self.config
        if config.freeze_at is not None and self.steps >= config.freeze_at and not self.frozen:
            self.freeze()
        if self.goes_on and self.steps == 0:
            # What it begins with may be the best that there will be.
            self._note()
        started = time.perf_counter()
        samples = self._samples()
        phase = "search" if not self.frozen else "frozen"
        self.model.train()
        loss = self._train_step(samples)
        self.steps += 1
        averaged = self._averaged()
        if averaged:
            self._average.step(averaged)
        spent = time.perf_counter() - started
        if len(self.step_seconds[phase]) < _TIMED_STEPS:
            self.step_seconds[phase].append(spent)
        self.seconds += spent
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} in epoch {math.ceil(self.epochs)}; "
                "lower --table-lr or --lr"
            )
        self.losses.append(loss)
        if self._due():
            self._validate()
            self._go_on()
        return loss, len(samples)

    def _samples(self) -> Tensor:
        epoch, position = divmod(self.steps, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.task.train), generator=generator)
        size = self.config.batch_size
        return self._order[1][position * size : (position + 1) * size]

    def _train_step(self, samples: Tensor) -> float:
        batch = self.task.train.batch(samples)
        if self._hiding is not None:
            seed = (self.config.seed + 1 << 32) + self.steps
            batch = batch._replace(indices=self._hiding.hide(batch.indices, seed))
        labels = batch.labels
        if self.taught is not None:
            labels = labels.lerp(self.taught[samples], self.config.distillation or 0.0)
        loss = self._loss(self.model(batch), labels, batch.weights)
        loss.backward()
        for optimizer in (self.dense_optimizer, self.table_optimizer, self.mask_optimizer):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        return float(loss.detach())

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        # Over the batch's rows and not its weight: a batch that weighs more is a larger step.
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, weights)

    def _due(self) -> bool:
        """Whether a validation comes after the step just taken: some a lap, evenly spread."""
        within = (self.steps - 1) % self.steps_per_epoch + 1
        times = min(self.config.validations * self.laps, self.steps_per_epoch)
        return (
            within * times // self.steps_per_epoch != (within - 1) * times // self.steps_per_epoch
        )

    def scores(self, logits: Tensor | None = None) -> tuple[float, float]:
        """AUC and log loss on the validation split, of the model as it would be stored.

        Args:
            logits: what it says there, if that is known.
        """
        if logits is None:
            logits = predict(self.model, self.task.val)
        labels, weights = self.task.val.labels, self.task.val.weights
        return auc(logits, labels, weights), log_loss(logits, labels, weights)

    def _score(self, area: float, loss: float) -> float:
        """What models are chosen by, of what `scores` gives."""
        return score(area, loss, self.task.val.labels, self.task.val.weights)

    def _averaged(self) -> list[Tensor]:
        """The numbers whose average is validated: none while sizes are searched, or of codes."""
        numbers: list[Tensor] = list(self.model.parameters()) if self.frozen else []
        return numbers if all(each.is_floating_point() for each in numbers) else []

    def _validate(self) -> None:
        with self._average.shown(self._averaged()):
            self._note()

    def _settle_unseen(self) -> None:
        trained = self._hiding.fields if self._hiding is not None else ()
        settle_unseen(self.table, self.task.encoder, trained)

    def _note(self) -> None:
        """Puts a validation on record, and keeps the model if it is the best so far."""
        self._settle_unseen()
        area, loss = self.scores()
        record: dict[str, Any] = {
            "step": self.steps,
            "epoch": round(self.epochs, 4),
            "phase": self.phase,
            "stage": self.stage,
            "loss": statistics.fmean(self.losses) if self.losses else None,
            "val_auc": area,
            "val_logloss": loss,
            "score": self._score(area, loss),
            "stored_bytes": methods.stored_bytes(self.table),
            "seconds": self.seconds,
        }
        self.losses, self.seconds = [], 0.0
        self.history.append(record)
        record["best"] = not math.isnan(area) and (
            self.best is None or record["score"] > self.best["record"]["score"]
        )
        if record["best"]:
            self.best = {"record": record, **self._snapshot()}

    def _go_on(self) -> None:
        """Ends training, or a stage of it, if the last validation says so."""
        stage_ends = self._waited_long(self.history[-1])
        waiting = self.config.freeze_at is not None and not self.frozen
        if self.steps >= self.config.epochs * self.steps_per_epoch:
            self.finished = True
        elif stage_ends and not waiting:
            self._turn()

    def _waited_long(self, record: dict[str, Any]) -> bool:
        """Whether a stage of training has gained nothing for so long that this one ends it."""
        config = self.config
        decays = bool(config.embedding_decay)
        moves = record["best"] or (decays and self._moves(record))
        self.stale = 0 if moves else self.stale + 1
        if not decays:
            patience = max(2, config.patience // 2) if self.stage else config.patience
            return self.stale >= patience
        patience = config.patience * (1 if self.stage else _AT_FULL_RATES)
        # Each stage has as large a part of the epochs that are left.
        share = 1 - (1 - _LAST) / 2**self.stage
        late = self.steps >= share * (config.epochs * self.steps_per_epoch)
        if self.stage and self._lags():
            return True
        return self.stale >= patience or (late and self.stage < config.rate_drops)

    def _moves(self, record: dict[str, Any]) -> bool:
        """Whether a stage has never scored as well, or will as its average follows, with decay.

        Validations go up and down with the steps since its last pass, so a stage is held against
        itself, not against the peak that it went back to. What is learned fast, after a plateau,
        the numbers as they are show before their average. At smaller rates all may be lost first,
        until decay has caught up with what they learn by heart: then a stage comes back.
        """
        before = self._scores_of_stage()[:-1]
        best, now = max(before, default=-math.inf), record["score"]
        if now > best or not before or self._score(*self.scores()) > best:
            return True
        lowest = min(range(len(before)), key=before.__getitem__)
        fallen = max(before[: lowest + 1]) - before[lowest]
        return now > max(before[lowest:]) and now > before[lowest] + _BACK * fallen

    def _lags(self) -> bool:
        """Whether a stage that is far behind the best model won't reach it in time at its pace."""
        scores = self._scores_of_stage()
        lowest = min(range(len(scores)), key=scores.__getitem__)
        over = self.config.patience
        if self.best is None or len(scores) <= lowest + over:
            return False
        behind = self.best["record"]["score"] - scores[-1]
        pace = (scores[-1] - scores[-1 - over]) / over
        times = min(self.config.validations * self.laps, self.steps_per_epoch)
        return behind > _FAR and pace * (self.config.epochs - self.epochs) * times < behind

    def _scores_of_stage(self) -> list[float]:
        return [record["score"] for record in self.history if record["stage"] == self.stage]

    def _turn(self) -> None:
        """Back to the best model: freeze its sizes, or go on with smaller rates, or end."""
        if self.best is None or self.stage >= self.config.rate_drops:
            self.finished = True
            return
        self.stage += 1
        self.stale = 0
        self._restore(self.best)
        if not self.frozen:
            self.freeze()
        self._set_rates()
        self._average.begin()

    def refine(self) -> None:
        """Takes the model as it is for the best so far, and goes on at smaller rates."""
        self.stage = 1
        self._set_rates()
        self._validate()
        self._go_on()

    def _settle(self, optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer]) -> None:
        """Fixes sizes that nothing would change, if they are not."""
        if self.config.freeze_at is None and methods.has_settled_sizes(self.table):
            self.table.freeze(optimizer)  # type: ignore[operator]

    def freeze(self) -> None:
        """Fixes the sizes; the table and its optimizer's state move to tiers."""
        self.table.freeze(self.table_optimizer)  # type: ignore[operator]
        self.mask_optimizer = None
        self._average.begin()

    def end(self) -> None:
        """Back to the best model for good, its sizes frozen.

        Raises:
            UserError: no validation gave an AUC.
        """
        if self.best is None:
            raise UserError("no epoch gave a valid AUC; does validation hold both classes?")
        if self._ended:
            return
        self.finished = self._ended = True
        self._restore(self.best)
        if not self.frozen:
            self.freeze()
            self._settle_unseen()

    def says(self) -> Tensor:
        """Logits of the validation split by the best model, which this goes back to for good."""
        if not self.released:
            self.end()
        if self.said is None:
            self.said = predict(self.model, self.task.val)
        return self.said

    @torch.no_grad()
    def calm(self) -> bool:
        """Makes logits as small as validation has them, where they are too sure; see `calming`.

        The last layer of the MLP takes that, where nothing is added to it. What was validated stays
        on record as it was: other models, which this is compared with, are as they were, too.

        Returns:
            Whether anything changed.
        """
        assert self.best is not None
        if type(self.model.interaction) is not Interaction:
            return False
        factor = calming(self.says(), self.task.val.labels, self.task.val.weights)
        if factor == 1:
            return False
        self._calmed *= factor
        for parameter in self.model.mlp[-1].parameters():
            parameter.mul_(factor)
        self.best = {**self.best, "model": copy.deepcopy(self.model.state_dict())}
        return True

    @torch.no_grad()
    def round_dense(self) -> bool:
        """Rounds all but the table to 8 bits, or to 16, if validation loses next to nothing by it.

        The model stays in 32 bits; its numbers then fit into fewer, and packed files hold them so.

        Returns:
            Whether it was rounded.
        """
        assert self.best is not None
        parameters, record = self.model.dense_parameters(), self.best["record"]
        kept = [p.detach().clone() for p in parameters]
        said, val = self.says(), self.task.val
        for rounded in (to_bytes, to_halves):
            for p, values in zip(parameters, kept, strict=True):
                p.copy_(rounded(values))
            says = predict(self.model, val) / self._calmed
            area, loss = self.scores(says)
            found = self._score(area, loss)
            error = min(score_error(says, said, val.labels, val.weights), _LITTLE)
            if found >= record["score"] - max(_NEXT_TO_NOTHING, error):
                scores = {"val_auc": area, "val_logloss": loss, "score": found}
                model = copy.deepcopy(self.model.state_dict())
                self.best = {**self.best, "record": {**record, **scores}, "model": model}
                self.said = says
                return True
        for p, values in zip(parameters, kept, strict=True):
            p.copy_(values)
        return False

    def stand(self, steps: float, history: list[dict[str, Any]]) -> None:
        """Takes the scores of a training after so many steps; its numbers are elsewhere."""
        self.steps = int(steps)
        self.history = [record for record in history if record["step"] <= steps]
        best = [record for record in self.history if record["best"]]
        self.best = {"record": best[-1]} if best else None

    def release(self) -> None:
        """Lets go of the model; its history, and what it said of validation, are left."""
        if self.released:
            return
        del self.model, self.table, self.table_optimizer, self.dense_optimizer, self.mask_optimizer
        self._average.begin()
        self.released = True
        if self.best is not None:
            self.best = {"record": self.best["record"]}
        if self.leaving is not None:
            self.leaving(self)

    def _snapshot(self) -> dict[str, Any]:
        """The model and its optimizers, copied."""
        return copy.deepcopy(self._parts())

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "table_optimizer": self.table_optimizer.state_dict(),
            "dense_optimizer": self.dense_optimizer.state_dict(),
            "mask_optimizer": self.mask_optimizer.state_dict() if self.mask_optimizer else None,
        }

    def _restore(self, parts: dict[str, Any]) -> None:
        self.model.load_state_dict(parts["model"])
        self._make_optimizers()
        self.table_optimizer.load_state_dict(copy.deepcopy(parts["table_optimizer"]))
        self.dense_optimizer.load_state_dict(copy.deepcopy(parts["dense_optimizer"]))
        if self.mask_optimizer and parts["mask_optimizer"]:
            self.mask_optimizer.load_state_dict(copy.deepcopy(parts["mask_optimizer"]))
        self._set_rates()

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""
        return {
            **self._parts(),
            "steps": self.steps,
            "stage": self.stage,
            "stale": self.stale,
            "finished": self.finished,
            "history": self.history,
            "losses": self.losses,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "best": self.best,
            "average": self._average.state(),
            "passes": getattr(self.table, "passes", 0),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.steps, self.stage, self.stale = state["steps"], state["stage"], state["stale"]
        self._restore(state)
        # Checkpoints of earlier versions have none.
        if "average" in state:
            self._average.load_state(state["average"])
        if methods.is_adaptive(self.table):
            self.table.passes = state.get("passes", 0)
        self.finished, self.best = state["finished"], state["best"]
        self.history, self.losses = state["history"], state["losses"]
        self.step_seconds, self.seconds = state["step_seconds"], state["seconds"]
        self.rng = state["rng"]
