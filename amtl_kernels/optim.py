"""Optimizers for tables with sparse gradients: only looked-up rows, and of those only kept values.

Each is its dense namesake of ``torch.optim`` on the values that a lookup touched. A row gradient
``grads[u]`` is zero past the kept size of its row, and everything past its last non-zero value,
weight and state, is left alone: no decay, no momentum. Gradients may be accumulated over several
backward passes, and a group may hold dense parameters as well, which get the plain dense update.

State is float32 whatever the type of the parameter, and is made at the first step. Cost of a step:
``O(U * k_mean)`` for ``U`` rows in the gradient, plus sorting them when several backward passes
were accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from amtl_kernels.memory import empty_table

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


def rows_and_grads(grad: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse ``[N, D]`` gradient as strictly ascending rows ``[U]`` and values ``[U, D]``.

    Costs a comparison of neighbouring rows when the gradient comes from one backward pass; sorts
    and sums only what was accumulated over several.
    """
    rows, values = grad._indices()[0], grad._values()
    if rows.numel() > 1 and not bool((rows[1:] > rows[:-1]).all()):
        grad = grad.coalesce()
        rows, values = grad._indices()[0], grad._values()
    return rows.contiguous(), values.contiguous()


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


def _non_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative, got {value}")


class RowOptimizer(torch.optim.Optimizer):
    """Runs one update for each parameter: sparse through the operators, dense in PyTorch."""

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
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if grad.is_sparse:
                    if parameter.dim() != 2 or grad.sparse_dim() != 1:
                        raise ValueError("sparse gradients are taken for [N, D] tables only")
                    self._sparse(parameter, *rows_and_grads(grad), group, state)
                else:
                    self._dense(parameter, grad, group, state)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, which keeps its own type: float32 also for 16-bit parameters.

        Args:
            state_dict: What ``state_dict()`` returned.
        """
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)

    def fused_update(self, tables: list[Tensor]) -> tuple[int, list[Tensor], list[float]]:
        """What a fused backward needs to update ``tables`` now, counting this as a step of theirs.

        Args:
            tables: Parameters of one group of this optimizer.

        Returns:
            The optimizer's number in the operators, state tensors table by table, and the
            hyperparameters ``lr, eps, weight_decay, beta1, beta2, step``.

        Raises:
            ValueError: The tables are not in one group of this optimizer.
        """
        group = self.check_owns(tables)
        states: list[Tensor] = []
        step = 1
        for table in tables:
            step = self._fused_state(table, group, states)
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        hyper = [
            float(group["lr"]),
            group.get("eps", 0.0),
            group["weight_decay"],
            beta1,
            beta2,
            float(step),
        ]
        return self._number, states, hyper

    def check_owns(self, tables: list[Tensor]) -> dict[str, Any]:
        """The parameter group that holds all ``tables``.

        Args:
            tables: Parameters of one group of this optimizer.

        Returns:
            That group.

        Raises:
            ValueError: There is none.
        """
        wanted = {id(table) for table in tables}
        for group in self.param_groups:
            if wanted <= {id(parameter) for parameter in group["params"]}:
                return group
        raise ValueError("the tables of a fused lookup must be in one group of its optimizer")

    _number = -1

    def _fused_state(self, table: Tensor, group: dict[str, Any], states: list[Tensor]) -> int:
        """Appends the table's state to ``states``; returns its number of steps."""
        raise NotImplementedError

    def _sparse(
        self, table: Tensor, rows: Tensor, grads: Tensor, group: dict[str, Any], state: Any
    ) -> None:
        raise NotImplementedError

    def _dense(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: Any) -> None:
        raise NotImplementedError


def _state_like(parameter: Tensor, shape: torch.Size | None = None, fill: float = 0.0) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    state = empty_table(*(shape or parameter.shape), dtype=dtype, device=parameter.device)
    return state.fill_(fill)


def _decayed(parameter: Tensor, grad: Tensor, weight_decay: float) -> Tensor:
    """The gradient in the type of the state, with weight decay."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    grad = grad.to(dtype)
    return grad.add(parameter.to(dtype), alpha=weight_decay) if weight_decay else grad


class SGD(RowOptimizer):
    """``w -= lr * (g + weight_decay * w)`` on touched values.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        weight_decay: L2 penalty, on touched values only.

    Raises:
        ValueError: A hyperparameter is negative.
    """

    def __init__(self, params: Parameters, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        _non_negative(lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    _number = 0

    def _fused_state(self, table: Tensor, group: dict[str, Any], states: list[Tensor]) -> int:
        return 1

    def _sparse(
        self, table: Tensor, rows: Tensor, grads: Tensor, group: dict[str, Any], state: Any
    ) -> None:
        torch.ops.amtl.apply_sgd_(table, rows, grads, float(group["lr"]), group["weight_decay"])

    def _dense(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: Any) -> None:
        grad = _decayed(parameter, grad, group["weight_decay"])
        parameter.add_(grad.to(parameter.dtype), alpha=-float(group["lr"]))


class Adagrad(RowOptimizer):
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)`` on touched values.

    State: ``sum`` of the shape of the parameter.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        eps: Added to the root.
        weight_decay: L2 penalty, on touched values only.
        initial_accumulator_value: What ``sum`` starts from.

    Raises:
        ValueError: A hyperparameter is negative.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        _non_negative(
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
        )
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults)

    def _sum(self, parameter: Tensor, group: dict[str, Any], state: Any) -> Tensor:
        if "sum" not in state:
            state["sum"] = _state_like(parameter, fill=group["initial_accumulator_value"])
        total: Tensor = state["sum"]
        return total

    _number = 1

    def _fused_state(self, table: Tensor, group: dict[str, Any], states: list[Tensor]) -> int:
        states.append(self._sum(table, group, self.state[table]))
        return 1

    def _sparse(
        self, table: Tensor, rows: Tensor, grads: Tensor, group: dict[str, Any], state: Any
    ) -> None:
        torch.ops.amtl.apply_adagrad_(
            table,
            self._sum(table, group, state),
            rows,
            grads,
            float(group["lr"]),
            group["eps"],
            group["weight_decay"],
        )

    def _dense(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: Any) -> None:
        grad = _decayed(parameter, grad, group["weight_decay"])
        total = self._sum(parameter, group, state)
        total.addcmul_(grad, grad)
        step = grad / (total.sqrt() + group["eps"])
        parameter.add_(step.to(parameter.dtype), alpha=-float(group["lr"]))


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one sum a row: ``s += mean(g^2)``, ``w -= lr * g / (sqrt(s) + eps)``.

    The mean runs over the kept prefix of the row. State: ``sum`` ``[N]``; a parameter of another
    rank keeps one sum per leading index.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        eps: Added to the root.
        weight_decay: L2 penalty, on touched values only.
        initial_accumulator_value: What ``sum`` starts from.

    Raises:
        ValueError: A hyperparameter is negative.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        _non_negative(
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
        )
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults)

    def _sum(self, parameter: Tensor, group: dict[str, Any], state: Any) -> Tensor:
        if "sum" not in state:
            state["sum"] = _state_like(
                parameter, parameter.shape[:1], group["initial_accumulator_value"]
            )
        total: Tensor = state["sum"]
        return total

    _number = 2

    def _fused_state(self, table: Tensor, group: dict[str, Any], states: list[Tensor]) -> int:
        states.append(self._sum(table, group, self.state[table]))
        return 1

    def _sparse(
        self, table: Tensor, rows: Tensor, grads: Tensor, group: dict[str, Any], state: Any
    ) -> None:
        torch.ops.amtl.apply_rowwise_adagrad_(
            table,
            self._sum(table, group, state),
            rows,
            grads,
            float(group["lr"]),
            group["eps"],
            group["weight_decay"],
        )

    def _dense(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: Any) -> None:
        grad = _decayed(parameter, grad, group["weight_decay"])
        total = self._sum(parameter, group, state)
        squares = grad * grad
        total.add_(squares.flatten(1).mean(1) if grad.dim() > 1 else squares)
        root = total.sqrt().add_(group["eps"])
        step = grad / root.reshape(-1, *[1] * (grad.dim() - 1)) if grad.dim() else grad / root
        parameter.add_(step.to(parameter.dtype), alpha=-float(group["lr"]))


class Adam(RowOptimizer):
    """Lazy Adam: ``torch.optim.Adam`` on touched values, moments of the others left alone.

    The bias correction uses the parameter's own number of steps. State: ``step`` (a scalar
    tensor), ``exp_avg`` and ``exp_avg_sq`` of the shape of the parameter.

    Args:
        params: Parameters or groups, as in ``torch.optim``.
        lr: Learning rate.
        betas: Decay of the two moments, each in ``[0, 1)``.
        eps: Added to the root.
        weight_decay: L2 penalty, on touched values only.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _advance(self, parameter: Tensor, state: Any) -> int:
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = _state_like(parameter)
            state["exp_avg_sq"] = _state_like(parameter)
        state["step"] += 1
        return int(state["step"])

    _number = 3

    def _fused_state(self, table: Tensor, group: dict[str, Any], states: list[Tensor]) -> int:
        state = self.state[table]
        step = self._advance(table, state)
        states.extend([state["exp_avg"], state["exp_avg_sq"]])
        return step

    def _sparse(
        self, table: Tensor, rows: Tensor, grads: Tensor, group: dict[str, Any], state: Any
    ) -> None:
        step = self._advance(table, state)
        torch.ops.amtl.apply_adam_(
            table,
            state["exp_avg"],
            state["exp_avg_sq"],
            rows,
            grads,
            step,
            float(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )

    def _dense(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: Any) -> None:
        step = self._advance(parameter, state)
        beta1, beta2 = group["betas"]
        grad = _decayed(parameter, grad, group["weight_decay"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        change = mean / root
        parameter.add_(change.to(parameter.dtype), alpha=-float(group["lr"]) / (1 - beta1**step))
