"""Small float64 models with adapters, batches, and loops over them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyctrlora
from pyctrlora.adapters import adapter_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


# `--hypothesis-profile=long`: a thousand examples where the ordinary tests take a hundred.
settings.register_profile("long", max_examples=1000)


class Net(nn.Module):
    """Three linears with tanh between them, tokens (batch, tokens, 6) to (batch, tokens, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 5)
        self.reentrant: bool | None = None  # no checkpointing

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.reentrant is None:
            h = self.middle(h)
        else:
            h = checkpoint(self.middle, h, use_reentrant=self.reentrant)
        out: Tensor = self.third(h)
        return out

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(h))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def net() -> Callable[..., Any]:
    """`net(kind)`: a Net with adapters, "own" or "peft", all equal for equal arguments."""

    def build(
        kind: str = "own",
        rank: int = 3,
        alpha: float = 6.0,
        start: float = 0.3,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        **config: Any,
    ) -> Any:
        torch.manual_seed(seed)
        model: Any = Net().to(dtype)
        if kind == "own":
            pyctrlora.add_lora(model, rank=rank, alpha=alpha, targets=["first", "second", "third"])
        elif kind == "peft":
            peft = pytest.importorskip("peft")
            config.setdefault("target_modules", ["first", "second", "third"])
            config = {"r": rank, "lora_alpha": alpha, **config}
            model = peft.get_peft_model(model, peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed + 1)
        for name, p in model.named_parameters():
            if "lora_" in name and p.dim() == 2:
                scale = start if p.shape[1] == rank else 0.4  # B, A
                with torch.no_grad():
                    p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=dtype))
        return model

    return build


@pytest.fixture
def batches() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """`batches(n)`: n batches of 4 x 5 tokens with targets."""

    def build(
        count: int, size: int = 4, dtype: torch.dtype = torch.float64
    ) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(7)
        return [
            tuple(torch.randn(size, 5, d, generator=generator, dtype=dtype) for d in (6, 5))  # type: ignore[misc]
            for _ in range(count)
        ]

    return build


@pytest.fixture
def train() -> Callable[..., list[float]]:
    """`train(model, opt, data)`: a plain loop over a token-mean loss; returns the losses."""

    def run(
        model: nn.Module,
        opt: torch.optim.Optimizer,
        data: list[tuple[Tensor, Tensor]],
        before_step: Callable[[], object] = lambda: None,
    ) -> list[float]:
        losses = []
        for x, y in data:
            loss = (model(x) - y).square().sum(-1).mean()
            opt.zero_grad()
            loss.backward()
            before_step()
            opt.step()
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def trained() -> Callable[[nn.Module], dict[str, Tensor]]:
    """`trained(model)`: copies of its trainable parameters by name."""

    def read(model: nn.Module) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    return read


@pytest.fixture
def products() -> Callable[[Any], dict[str, Tensor]]:
    """`products(opt)`: the change s B A that each pair makes to its layer, by name."""

    def read(opt: Any) -> dict[str, Tensor]:
        pairs = [pair for _, pair in opt._roster.all_pairs()]
        return {p.name: (p.scaling * p.b @ p.a).detach().clone() for p in pairs}

    return read


@pytest.fixture
def switch_off() -> Callable[..., None]:
    """`switch_off(model, ranks)`: zeroes first directions of its layers down to these ranks."""

    def change(model: nn.Module, ranks: Mapping[str, int]) -> None:
        for layer in adapter_layers(model):
            with torch.no_grad():
                for i in range(layer.rank - ranks[layer.path]):
                    layer.a[i], layer.b[:, i] = 0.0, 0.0

    return change


@pytest.fixture
def state() -> Callable[[Any], dict[str, Tensor]]:
    """`state(opt)`: copies of all tensors of the engine."""

    def read(opt: Any) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = copy.deepcopy(opt.state_dict()["ctrlora"]["tensors"])
        return tensors

    return read


@pytest.fixture
def same() -> Callable[..., None]:
    """`same(x, y, rtol)`: two dicts of tensors agree; rtol 0 means bit for bit."""

    def check(x: dict[str, Tensor], y: dict[str, Tensor], rtol: float = 0.0) -> None:
        assert x.keys() == y.keys()
        for name in x:
            scale = rtol * y[name].abs().max().item() if rtol else 0.0
            difference = (x[name].double() - y[name].double()).abs().max().item()
            assert difference <= scale, f"{name}: {difference} > {scale}"

    return check
