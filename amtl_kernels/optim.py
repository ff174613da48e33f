"""Optimizers for tables with sparse gradients: only looked-up rows, and of those only kept values.

Each is its dense namesake of ``torch.optim`` on the values that a lookup touched. A row gradient
``grads[u]`` is zero past the kept size of its row, and everything past its last non-zero value,
weight and state, is left alone: no decay, no momentum. Gradients may be accumulated over several
backward passes, and a group may hold dense parameters as well, which get the plain dense update.

State is float32 whatever the type of the parameter, and is made at the first step. Cost of a step:
``O(U * k_mean)`` for ``U`` rows in the gradient, plus sorting them when several backward passes
were accumulated.

Options of every optimizer here:

``weight_decay``, ``decay_every``: with 0, the default, decay is part of a looked-up row's gradient,
and rows that nobody looks up keep what they have. With K, every value of a parameter is decayed
after K of its updates, at the next one, by as much as in K of them: ``w *= max(0, 1 - K * lr *
weight_decay / root)``, ``root`` what the optimizer divides a gradient by. Rare rows overfit most,
and it is between two of their lookups that they have to shrink; one that was never looked up
becomes zero. A pass over all values in K steps costs less the larger K is; 16 is what was measured.

``stochastic_rounding``: 16-bit parameters are rounded up or down at random, so that the mean is
kept and updates far below a unit in the last place still add up, where rounding to nearest would
stall. The random bits are an integer hash of the parameter's step, row and column: results repeat
bit for bit. Float32 parameters are not affected. The CPU kernels refuse it for 16-bit tables
(``amtl_kernels.set_backend("reference")`` takes it).

Tables of codes (uint8, see ``amtl_kernels.ops``) are always rounded so, by :class:`SGD` and
:class:`RowwiseAdagrad` within the backward of a lookup. They have no gradient, so ``step()`` does
nothing to them.

``capturable``: steps are counted on the device of the parameter, as in ``torch.optim.Adam``, so
that a CUDA graph of a fused step (``amtl_kernels.fused``) replays with the steps that follow, not
with the one that was captured. Make the state before the capture, by a step to warm up; the
learning rate is captured as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, overload

import torch
from torch import Tensor

from amtl_kernels import _arguments
from amtl_kernels._arguments import Step
from amtl_kernels.memory import empty_table
from amtl_kernels.rounding import round_stochastically, rounding_bits

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


def rows_and_grads(grad: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse ``[N, D]`` gradient as strictly ascending rows ``[U]`` and values ``[U, D]``.

    Costs a comparison of neighbouring rows when the gradient comes from one backward pass; sorts
    and sums only what was accumulated over several.
    """
    rows, values = grad._indices()[0], grad._values()
    if rows.numel() > 1 and not bool((rows[1:] > rows[:-1]).all()):
        if values.device.type == "cpu" and values.dtype != torch.float64:
            return _summed(rows, values)
        grad = grad.coalesce()
        rows, values = grad._indices()[0], grad._values()
    return rows.contiguous(), values.contiguous()


def _summed(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``coalesce()`` on a CPU in a third of the time, for sums of rows are what bags are.

    In the same order, but sums of 16-bit numbers are rounded once.
    """
    rows, order = rows.sort(stable=True)
    first = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=first[1:])
    offsets = first.nonzero()[:, 0]
    return rows[offsets], torch.nn.functional.embedding_bag(order, values, offsets, mode="sum")


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients so that their joint Euclidean norm is at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` for sparse and dense gradients together. A gradient
    accumulated over several backward passes is coalesced first, in place of the old one.

    Args:
        parameters: Parameters whose ``grad`` counts; those without one are skipped.
        max_norm: Largest norm allowed, positive.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            rows, grads = rows_and_grads(parameter.grad)
            if grads.data_ptr() != parameter.grad._values().data_ptr():
                parameter.grad = torch.sparse_coo_tensor(
                    rows[None],
                    grads,
                    parameter.grad.shape,
                    is_coalesced=True,
                    check_invariants=False,
                )
            values.append(grads)
        else:
            values.append(parameter.grad)
    if not values:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in values]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale.to(device=value.device, dtype=value.dtype))
    return norm


class RowOptimizer(torch.optim.Optimizer):
    """Updates parameters: those with sparse gradients by an operator, dense ones in PyTorch."""

    # The optimizer's number in the operators.
    _number = -1
    # State tensors, in the order of the operators.
    _names: tuple[str, ...] = ()
    # Whether the update itself depends on the step.
    _always_counts = False

    def __init__(self, params: Parameters, **defaults: Any) -> None:
        for name in ("lr", "eps", "weight_decay", "initial_accumulator_value", "decay_every"):
            if not defaults.get(name, 0.0) >= 0.0:
                raise ValueError(f"{name} must not be negative, got {defaults[name]}")
        if defaults["decay_every"] and defaults["capturable"]:
            raise ValueError("decay_every counts steps on the host: it does not go with capturable")
        self._places: dict[int, tuple[int, int]] = {}
        self._counters: dict[int, tuple[list[Tensor], Tensor]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._places, self._counters = {}, {}
        for group in self.param_groups:
            group.setdefault("stochastic_rounding", False)
            group.setdefault("capturable", False)
            group.setdefault("decay_every", 0)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss, as in ``torch.optim``.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = []
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                self._decay([parameter], group)
                if grad.is_sparse:
                    if parameter.dim() != 2 or grad.sparse_dim() != 1:
                        raise ValueError("sparse gradients are taken for [N, D] tables only")
                    sparse.append((parameter, group))
                else:
                    self._dense(parameter, grad, group)
        self._sparse(sparse)
        return loss

    def _decay(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Before an update of parameters of this group: decays them whole if it is their turn."""
        every = group["decay_every"]
        if not every or not group["weight_decay"]:
            return
        for parameter in parameters:
            if parameter.dtype == torch.uint8:
                raise ValueError("decay_every is not for tables of codes, which have no masters")
            state = self.state[parameter]
            updates = state.get("updates", 0)
            if updates == every:
                strength = every * float(group["lr"]) * group["weight_decay"]
                if strength:
                    self._shrink(parameter.data, strength, state, group)
                updates = 0
            state["updates"] = updates + 1

    @torch.no_grad()
    def _shrink(
        self, parameter: Tensor, strength: float, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Multiplies a parameter by `max(0, 1 - strength / root)`, some rows at a time."""
        moments, step = [state[name] for name in self._names], int(state.get("step", 0))
        values = parameter
        if parameter.dim() < 2:
            values, moments = parameter[None], [moment[None] for moment in moments]
        at_once = _AT_ONCE if parameter.device.type == "cpu" else 1 << 24
        count = max(1, at_once // max(1, values[:1].numel()))
        for at in range(0, len(values), count):
            rows = values[at : at + count]
            root = self._root([moment[at : at + count] for moment in moments], step, group)
            kept = root.reciprocal_().mul_(-strength).add_(1).clamp_(min=0)
            if 0 < kept.dim() < rows.dim():
                kept = kept.reshape(-1, *[1] * (rows.dim() - 1))
            if parameter.element_size() > 2:
                rows.mul_(kept)
            elif group["stochastic_rounding"]:
                _round_into(rows, rows.float() * kept, step, at)
            else:
                rows.copy_(rows.float() * kept)

    def _root(self, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> Tensor:
        """What a gradient is divided by, of some rows, as a new tensor."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, which keeps its own type: float32 also for 16-bit parameters.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: The groups hold other numbers of parameters.
        """
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise ValueError(
                f"{error}. A frozen table is a parameter for each of its tiers: load the state of "
                "the model, which freezes it as it was, before that of its optimizer"
            ) from None
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if not isinstance(value, Tensor):
                    continue
                mine = value.detach().clone()
                if name != "step":
                    mine = mine.to(parameter.device)
                elif self.check_owns([parameter])["capturable"]:
                    mine = mine.to(parameter.device, torch.int64)
                else:
                    mine = mine.to("cpu", torch.float32)
                self.state[parameter][name] = mine

    def fused_update(self, tables: list[Tensor]) -> Step:
        """What a fused backward needs to update ``tables`` now, counting this as a step of theirs.

        Args:
            tables: Parameters of one group of this optimizer.

        Returns:
            State tensors table by table, followed by the step counter if it is on the device; the
            optimizer's number in the operators; and the hyperparameters ``lr, eps, weight_decay,
            beta1, beta2, step``, followed by 1 for stochastic rounding.

        Raises:
            ValueError: The tables are not in one group of this optimizer.
        """
        group = self.check_owns(tables)
        self._decay(tables, group)
        states = [self.state[table] for table in tables]
        try:
            moments = [state[name] for state in states for name in self._names]
        except KeyError:
            moments = [moment for table in tables for moment in self._moments(table, group)]
        step = self._advance_together(tables, states, group)
        if isinstance(step, Tensor):
            moments.append(step)
            step = 1
        return Step(moments, self._number, self._hyper(group, step))

    def _hyper(self, group: dict[str, Any], step: int) -> list[float]:
        """Hyperparameters as the operators take them."""
        return [
            float(group["lr"]),
            group.get("eps", 0.0),
            0.0 if group["decay_every"] else group["weight_decay"],
            *group.get("betas", (0.0, 0.0)),
            float(step),
            *([1.0] if group["stochastic_rounding"] else []),
        ]

    def check_owns(self, tables: list[Tensor]) -> dict[str, Any]:
        """The parameter group that holds all ``tables``.

        Args:
            tables: Parameters of one group of this optimizer.

        Returns:
            That group.

        Raises:
            ValueError: There is none.
        """
        first, count = tables[0], len(tables)
        # Mostly they lie side by side, as the tiers of a table do, and where they lay before.
        number, place = self._places.get(id(first), (0, 0))
        for group in self.param_groups[number : number + 1]:
            if _lie(group["params"], place, tables):
                return group
        for number, group in enumerate(self.param_groups):
            held = group["params"]
            for place in range(len(held) - count + 1):
                if held[place] is first and _lie(held, place, tables):
                    self._places[id(first)] = number, place
                    return group
        wanted = {id(table) for table in tables}
        for group in self.param_groups:
            if wanted <= {id(parameter) for parameter in group["params"]}:
                return group
        raise ValueError("the tables of a fused lookup must be in one group of its optimizer")

    def _moments(self, parameter: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """State tensors of the parameter, made if this is its first step."""
        state = self.state[parameter]
        for name in self._names:
            if name not in state:
                moment = empty_table(
                    *self._shape(parameter), dtype=_wide(parameter), device=parameter.device
                )
                state[name] = moment.fill_(group.get("initial_accumulator_value", 0.0))
        return [state[name] for name in self._names]

    def _shape(self, parameter: Tensor) -> torch.Size:
        """Of each of its state tensors."""
        return parameter.shape

    def _counts(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether an update of the parameter depends on the step, if only by its random bits."""
        codes = parameter.dtype == torch.uint8
        return self._always_counts or group["stochastic_rounding"] or codes

    def _advance(self, parameter: Tensor, group: dict[str, Any]) -> int | Tensor:
        """Counts one more step of the parameter; a tensor if that is counted on the device."""
        if not self._counts(parameter, group):
            return 1
        state, capturable = self.state[parameter], group["capturable"]
        if "step" not in state:
            dtype, device = (torch.int64, parameter.device) if capturable else (torch.float32, None)
            state["step"] = torch.zeros((), dtype=dtype, device=device)
        state["step"] += 1
        step: Tensor = state["step"]
        return step if capturable else int(step)

    def _advance_together(
        self, tables: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> int | Tensor:
        """As `_advance` of each table, whose states are given; the last one's step."""
        if len(tables) == 1 or not self._counts(tables[0], group):
            return [self._advance(table, group) for table in tables][-1]
        steps: list[Tensor] = [state["step"] for state in states if "step" in state]
        if len(steps) < len(states):
            return [self._advance(table, group) for table in tables][-1]
        if group["capturable"]:
            torch._foreach_add_(steps, 1)
            return steps[-1]
        known, counter = self._counters.get(id(tables[0]), ([], None))
        if counter is not None and len(known) == len(steps) and all(map(is_, known, steps)):
            counter += 1
            return int(steps[-1])
        if len(set(map(id, steps))) < len(steps):
            # A table that is given twice is counted twice.
            torch._foreach_add_(steps, 1)
            return int(steps[-1])
        # Views of one tensor, so that one addition counts them all; each can still go its own way.
        counter = torch.stack(steps).add_(1)
        for state, step in zip(states, counter.unbind(), strict=True):
            state["step"] = step
        self._counters[id(tables[0])] = [state["step"] for state in states], counter
        return int(counter[-1])

    def _sparse(self, tables: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Updates tables with sparse gradients, each given with its group.

        One call of the operator for all tables that agree in device, type and hyperparameters, of
        which the step is one.
        """
        calls: dict[Any, list[list[Tensor]]] = {}
        for table, group in tables:
            assert table.grad is not None
            moments = self._moments(table, group)
            hyper = tuple(self._hyper(group, int(self._advance(table, group))))
            call = calls.setdefault((table.device, table.dtype, hyper), [[], [], [], []])
            rows, grads = rows_and_grads(table.grad)
            for values, more in zip(call, ([table], [rows], [grads], moments), strict=True):
                values.extend(more)
        for (*_, hyper), (blocks, touched, given, moments) in calls.items():
            step = Step(moments, self._number, list(hyper))
            torch.ops.amtl.apply_(blocks, touched, given, *step)

    def _dense(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        moments = self._moments(parameter, group)
        step = self._advance(parameter, group)
        grad = grad.to(_wide(parameter))
        if group["weight_decay"] and not group["decay_every"]:
            grad = grad.add(parameter.to(grad.dtype), alpha=group["weight_decay"])
        change = self._change(grad, moments, step, group)
        lr = float(group["lr"])
        if group["stochastic_rounding"] and parameter.element_size() == 2:
            _round_into(parameter, parameter.float() - lr * change, step)
        else:
            parameter.add_(change.to(parameter.dtype), alpha=-lr)

    def _change(
        self, grad: Tensor, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]
    ) -> Tensor:
        """What a dense parameter moves by, for a learning rate of one."""
        raise NotImplementedError


_AT_ONCE = 1 << 17
"""Values that are decayed at once on a CPU, so that they and their state stay in a cache."""


def _lie(held: list[Tensor], place: int, tables: list[Tensor]) -> bool:
    """Whether these tables are held from a place on."""
    side_by_side = held[place : place + len(tables)]
    return len(side_by_side) == len(tables) and all(map(is_, side_by_side, tables))


def _exact(step: int | Tensor) -> int | Tensor:
    """A number of steps to take powers by: in float32 1 - beta^step would lose four digits."""
    return step.double() if isinstance(step, Tensor) else step


def _round_into(target: Tensor, values: Tensor, step: int | Tensor, first: int = 0) -> None:
    """Stores float32 values in 16 bits, rounded stochastically; `first` is their first row."""
    table = values.reshape(values.shape[0] if values.dim() else 1, -1)
    rows = torch.arange(first, first + len(table), device=table.device)
    bits = rounding_bits(rows, table.shape[1], step)
    target.copy_(round_stochastically(table, target.dtype, bits).reshape(target.shape))


def _wide(parameter: Tensor) -> torch.dtype:
    """The type of the parameter's state and of sums for it."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


class SGD(RowOptimizer):
    """``w -= lr * (g + weight_decay * w)`` on touched values.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        weight_decay: L2 penalty, on touched values only unless there is ``decay_every``.
        stochastic_rounding: How 16-bit parameters are rounded, see the top of this module.
        capturable: Where steps are counted, see there.
        decay_every: How often all values are decayed, touched or not, see there.

    Raises:
        ValueError: A hyperparameter is negative.
    """

    _number = _arguments.SGD

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        decay_every: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            stochastic_rounding=stochastic_rounding,
            capturable=capturable,
            decay_every=decay_every,
        )

    def _change(
        self, grad: Tensor, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]
    ) -> Tensor:
        return grad

    def _root(self, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> Tensor:
        return torch.ones(())


class Adagrad(RowOptimizer):
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)`` on touched values.

    State: ``sum`` of the shape of the parameter.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        eps: Added to the root.
        weight_decay: L2 penalty, on touched values only unless there is ``decay_every``.
        initial_accumulator_value: What ``sum`` starts from.
        stochastic_rounding: How 16-bit parameters are rounded, see the top of this module.
        capturable: Where steps are counted, see there.
        decay_every: How often all values are decayed, touched or not, see there.

    Raises:
        ValueError: A hyperparameter is negative.
    """

    _number, _names = _arguments.ADAGRAD, ("sum",)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        decay_every: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            stochastic_rounding=stochastic_rounding,
            capturable=capturable,
            decay_every=decay_every,
        )

    def _change(
        self, grad: Tensor, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]
    ) -> Tensor:
        moments[0].addcmul_(grad, grad)
        return grad / self._root(moments, step, group)

    def _root(self, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> Tensor:
        return moments[0].sqrt().add_(group["eps"])


class RowwiseAdagrad(Adagrad):
    """Adagrad with one sum a row: ``s += mean(g^2)``, ``w -= lr * g / (sqrt(s) + eps)``.

    The mean runs over the kept prefix of the row. State: ``sum`` ``[N]``; a parameter of another
    rank keeps one sum per leading index. Arguments as for :class:`Adagrad`.
    """

    _number = _arguments.ROWWISE_ADAGRAD

    def _shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape[:1]

    def _change(
        self, grad: Tensor, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]
    ) -> Tensor:
        if not grad.numel():
            return grad
        squares = grad * grad
        moments[0].add_(squares.flatten(1).mean(1) if grad.dim() > 1 else squares)
        root = self._root(moments, step, group)
        return grad / root.reshape(-1, *[1] * (grad.dim() - 1)) if grad.dim() else grad / root


class Adam(RowOptimizer):
    """Lazy Adam: ``torch.optim.Adam`` on touched values, moments of the others left alone.

    The bias correction uses the parameter's own number of steps. State: ``step`` (a scalar
    tensor), ``exp_avg`` and ``exp_avg_sq`` of the shape of the parameter.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        betas: Decay of the two moments, each in ``[0, 1)``.
        eps: Added to the root.
        weight_decay: L2 penalty, on touched values only unless there is ``decay_every``.
        stochastic_rounding: How 16-bit parameters are rounded, see the top of this module.
        capturable: Where steps are counted, see there.
        decay_every: How often all values are decayed, touched or not, see there.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    _number, _names = _arguments.ADAM, ("exp_avg", "exp_avg_sq")
    _always_counts = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        decay_every: int = 0,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            stochastic_rounding=stochastic_rounding,
            capturable=capturable,
            decay_every=decay_every,
        )

    def _change(
        self, grad: Tensor, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]
    ) -> Tensor:
        beta1, beta2 = group["betas"]
        mean, square = moments
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return mean / self._root(moments, step, group) / (1 - beta1 ** _exact(step))

    def _root(self, moments: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> Tensor:
        corrected = (1 - group["betas"][1] ** _exact(step)) ** 0.5
        return (moments[1].sqrt() / corrected).add_(group["eps"])


# Tools that find optimizers by the names of torch's subclasses would find two of one name.
for _kind in (SGD, Adagrad, RowwiseAdagrad, Adam):
    _kind.__name__ = f"Table{_kind.__name__}"
