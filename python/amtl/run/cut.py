"""A sized model cut out of a trained one of full size.

What a table of full width has learned can be kept in fewer numbers if the first ones say most. So
the embeddings of each field are turned to their principal axes first, rows weighed by their counts:
with `V` the eigenvectors of `sum_i c_i e_i e_i'`, the most telling first, `e_i V` takes the place
of `e_i` and `A V` that of the first layer's weights `A` for the field. Nothing changes by that,
since `(A V)(V' e) = A e`; cutting rows to a prefix then loses as little as it can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.run import methods
from amtl.run.model import ClickModel


class Donor:
    """A trained model of full width, turned field by field.

    Args:
        model: the MLP alone over an `nn.Embedding` or `nn.EmbeddingBag` of width D; other
            backbones use embeddings in ways that turning would change.
        encoder: whose rows the table has.
    """

    def __init__(self, model: ClickModel, encoder: Encoder) -> None:
        weight = methods.table_parameters(model.table)[0].detach()
        self.weight = weight.clone()
        self.state = {k: v.detach().clone() for k, v in model.mlp.state_dict().items()}
        self._counts = encoder.counts()
        self._fields = encoder.row_fields()
        first = self.state["0.weight"]
        for f in range(model.num_fields):
            rows = encoder.field_rows(f)
            axes = principal_axes(weight[rows], self._counts[rows])
            self.weight[rows] = weight[rows] @ axes
            columns = slice(f * model.dim, (f + 1) * model.dim)
            first[:, columns] = first[:, columns] @ axes

    def fill(self, table: nn.Module) -> None:
        """Put the turned weights into a table that still searches its sizes.

        A shared row becomes the mean, by counts, of the rows that it stands in for.
        """
        (target,) = methods.table_parameters(table)
        with torch.no_grad():
            target.copy_(self.weight)
            if table.shared_rows is None:
                return
            nothing = table.row_dims() == 0  # type: ignore[operator]
            for f, row in enumerate(table.shared_rows.tolist()):  # type: ignore[operator, union-attr]
                merged = nothing & (self._fields == f)
                merged[row] = False
                seen = self._counts[merged].to(target.dtype)
                if float(seen.sum()) > 0:
                    target[row] = seen @ self.weight[merged] / seen.sum()


def principal_axes(rows: Tensor, counts: Tensor) -> Tensor:
    """Eigenvectors of `sum_i c_i e_i e_i'` by falling eigenvalue.

    Args:
        rows: `[n, D]`.
        counts: `[n]`, at least 0.

    Returns:
        Orthogonal `[D, D]`, axes in columns, of the type of `rows`. O(n · D²).
    """
    values = rows.double()
    _, axes = torch.linalg.eigh((values * counts.double()[:, None]).T @ values)
    return axes.flip(1).to(rows.dtype)
