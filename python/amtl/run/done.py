"""Trainings that a run has behind it, kept in its folder until it has come to its end.

What follows the first model is decided by what came out before, and a run that was stopped decides
it again, the same way. So it asks for the same trainings, and is handed what they had come to. A
model that was let go of leaves its scores and what it said; all others leave their numbers, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from amtl.errors import UserError
from amtl.run import folders
from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.teaching import says_of_train
from amtl.store.files import FileWriteError, json_text

CHECKPOINT_SECONDS = 300.0
"""When the last checkpoint is this old, another is saved in mid-epoch."""

FIRST, FULL = "first", "full"
"""Names of the model that others are held against, where time ran out, and of the table of full
size that a run is compared with."""

_SCORES = ("steps", "stage", "finished", "history", "step_seconds", "seconds")


class Interrupted(Exception):
    """Training stopped on request; the run folder holds something to resume from.

    Args:
        kept: what that is.
    """

    def __init__(self, kept: str = "a checkpoint") -> None:
        super().__init__(kept)
        self.kept = kept


class Done:
    """What one run has trained.

    Args:
        run: its folder.
        resumed: whether what lies there is of this run; else it is of one that this one replaces.
    """

    def __init__(self, run: Path, resumed: bool) -> None:
        self._run = run
        self._before = set(folders.trainings(run)) if resumed else set[str]()
        self._handed: list[tuple[Learner, dict[str, Any]]] = []
        self._saved_at = time.monotonic()
        self._checked: tuple[Tensor, int] | None = None

    def __len__(self) -> int:
        """How many trainings of before nobody has asked for yet."""
        return len(self._before)

    def has(self, config: TrainConfig, taught: Tensor | None) -> bool:
        """Whether a training of these settings and labels was there when the run went on."""
        return self._name(config, taught) in self._before

    def train(self, learner: Learner, steps: float) -> bool:
        """Hands a learner what it had come to after so many steps.

        Where it had come further it has its scores and no numbers, as if others were trained
        meanwhile; numbers come when it is asked for all of its steps.

        Args:
            learner: fresh, or handed before.
            steps: how many, from its start.

        Returns:
            Whether nothing is left to train; if not, it stands where it was stopped, if it was.
        """
        state = self._of(learner)
        if state is None:
            return False
        given_up = "model" not in state and not state["finished"]
        if steps < state["steps"] or (given_up and steps == state["steps"]):
            learner.stand(steps, state["history"])
            return True
        self._handed = [each for each in self._handed if each[0] is not learner]
        if given_up:
            # Others are ahead now than were then: there are no numbers to go on from.
            learner.stand(0, [])
            return False
        if "model" in state:
            learner.load_state(state)
        else:
            learner.leaving = None
            learner.release()
            for key in _SCORES:
                setattr(learner, key, state[key])
            learner.best = {"record": state["record"]} if state["record"] else None
        learner.said = state["said"]
        return learner.finished or learner.steps >= steps

    def _of(self, learner: Learner) -> dict[str, Any] | None:
        for handed, state in self._handed:
            if handed is learner:
                return state
        if learner.steps or not self._before:
            return None
        name = self._name(learner.config, learner.taught)
        if name not in self._before:
            return None
        self._before.remove(name)
        try:
            state = folders.load_training(self._run, name)
        except UserError:
            # What a damaged file has lost is trained again.
            return None
        self._handed.append((learner, state))
        return state

    def keep(self, learner: Learner) -> None:
        """Saves a training as it stands."""
        name = self._name(learner.config, learner.taught)
        # Others may have drawn random numbers in this process since.
        state = {**learner.state(), "rng": learner.rng, "said": learner.said}
        self._save(name, state)
        self._saved_at = time.monotonic()

    def give_up(self, learner: Learner) -> None:
        """Saves what is left of a training of which nobody needs the numbers any more."""
        name = self._name(learner.config, learner.taught)
        self._handed = [each for each in self._handed if each[0] is not learner]
        state = {key: getattr(learner, key) for key in _SCORES}
        record = None if learner.best is None else learner.best["record"]
        self._save(name, {**state, "record": record, "said": learner.said})

    def keep_as(self, name: str, learner: Learner, **more: Any) -> None:
        """Saves a model that is asked for by name, and what belongs to it."""
        self._save(name, {**learner.state(), "config": learner.config.to_dict(), "more": more})

    def named(
        self, name: str, make: Callable[[TrainConfig], Learner]
    ) -> tuple[Learner, dict[str, Any]] | None:
        """What `keep_as` has saved, if it has."""
        if name not in self._before:
            return None
        self._before.remove(name)
        state = folders.load_training(self._run, name)
        learner = make(TrainConfig.from_dict(state["config"]))
        learner.load_state(state)
        return learner, state["more"]

    def due(self) -> bool:
        """Whether a training that goes on should be saved as it stands."""
        return time.monotonic() - self._saved_at > CHECKPOINT_SECONDS

    def says(self, learner: Learner) -> Tensor:
        """What `says_of_train` gives, which a model that was let go of has said before."""
        name = self._name(learner.config, learner.taught) + "-says"
        if name in self._before:
            self._before.remove(name)
            logits: Tensor = folders.load_training(self._run, name)["logits"]
            return logits
        logits = says_of_train(learner)
        self._save(name, {"logits": logits})
        return logits

    def clear(self) -> None:
        """Removes all of it: the run has a model that came out of it."""
        folders.clear_trainings(self._run)
        self._before, self._handed = set(), []

    def _save(self, name: str, state: dict[str, Any]) -> None:
        # Where the disk is full a run that is stopped trains again; one that is not needs no file.
        with contextlib.suppress(FileWriteError):
            folders.save_training(self._run, name, state)

    def _name(self, config: TrainConfig, taught: Tensor | None) -> str:
        """The same for the same settings and labels, which come to the same model."""
        labels = 0
        if taught is not None:
            if self._checked is None or self._checked[0] is not taught:
                self._checked = taught, zlib.crc32(taught.numpy().data)
            labels = self._checked[1]
        text = f"{json_text(config.to_dict())} {labels}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
