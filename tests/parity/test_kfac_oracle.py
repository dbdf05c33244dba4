"""The reference's factors against curvlinops: exact Gauss-Newton and K-FAC, written by others."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from parity.problems import F64, ReferenceLinear, ReferenceModel, mlp, randn
from reference.ctr_reference import Settings, commit
from torch import Tensor, nn

with warnings.catch_warnings():  # linear_operator, which it imports, still scripts functions
    warnings.simplefilter("ignore", DeprecationWarning)
    import curvlinops

if TYPE_CHECKING:
    from collections.abc import Callable

close = torch.testing.assert_close


def rows_of(
    model: nn.Module, x: Tensor, losses: Callable[[Tensor], list[Tensor]]
) -> ReferenceModel:
    """Feeds the reference with one backward for each of the losses of one forward."""
    observed = ReferenceModel(model, Settings())
    output = model(x)
    for loss in losses(output):
        loss.backward(retain_graph=True)
    return observed


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_factors_are_the_exact_gauss_newton_block_of_a_deep_linear_net_with_one_datum() -> None:
    net = mlp([6, 5, 4, 3], 2, 0, zero_b=True)
    linears = [m for m in net if isinstance(m, ReferenceLinear)]
    plain = nn.Sequential(*(nn.Linear(i.a.shape[1], len(i.weight), bias=False) for i in linears))
    for target, source in zip(plain, linears, strict=True):
        target.weight = nn.Parameter(source.weight.clone())
        source.bias = None
    deep = nn.Sequential(*linears)
    x, y = randn(1, 6, seed=1), randn(1, 3, seed=2)
    # The Hessian of ‖f − y‖² is 2I: backpropagating √2·e_c for every output c yields its factor.
    observed = rows_of(deep, x, lambda f: [math.sqrt(2) * f[0, c] for c in range(3)])
    for pair, linear in zip(observed.reference.layers, plain, strict=True):
        commit(pair, Settings(loss_terms=1))
        exact = curvlinops.GGNLinearOperator(
            plain, nn.MSELoss(reduction="sum"), [linear.weight], [(x, y)]
        )
        block = exact @ torch.eye(linear.weight.numel(), dtype=F64)
        close(
            torch.kron(pair.output_factor.value, pair.input_factor.value),
            block,
            rtol=1e-9,
            atol=1e-9,
        )


class ClassesFirst(nn.Module):
    """(batch, tokens, classes) to the (batch, classes, tokens) that the cross entropy wants."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(9,), (4, 3)])
def test_factors_equal_those_of_curvlinops(reduction: str, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(*mlp([6, 5, 4], 2, 0, zero_b=True), ClassesFirst())
    linears = [m for m in net if isinstance(m, ReferenceLinear)]
    x, y = randn(*shape, 6, seed=1), torch.arange(math.prod(shape)).view(shape) % 4
    loss = nn.CrossEntropyLoss(reduction=reduction)
    observed = rows_of(net, x, lambda f: [loss(f, y)])
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), ClassesFirst())
    for target, source in zip((plain[0], plain[2]), linears, strict=True):
        target.weight, target.bias = nn.Parameter(source.weight), nn.Parameter(source.bias)
    for pair, linear in zip(observed.reference.layers, (plain[0], plain[2]), strict=True):
        commit(pair, Settings(loss_reduction=reduction))
        kfac = curvlinops.KFACLinearOperator(
            plain, loss, [linear.weight], [(x, y)], fisher_type="empirical", kfac_approx="expand"
        )
        # A summed loss is as many times the Fisher matrix of one term as there are terms.
        terms = y.numel() if reduction == "sum" else 1
        ours = terms * torch.kron(pair.output_factor.value, pair.input_factor.value)
        close(ours, kfac @ torch.eye(len(ours), dtype=F64), rtol=1e-9, atol=1e-12)
