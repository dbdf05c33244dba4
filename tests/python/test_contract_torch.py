"""torch's own optimizer harness over CTROptimizer.

`torch.testing._internal.common_optimizers` describes an optimizer by an `OptimizerInfo`; the wheel
has the harness and its error inputs, not the bodies of test/test_optim.py. The bodies below have
the names and the assertions of torch's, over a pair and over parameters without adapters, which
AdamW trains. Cases of torch's that do not apply, and why:

- foreach, fused, capturable, differentiable: these flags are not accepted, rather than ignored;
- complex and sparse parameters: refused by name (test_faults.py);
- several devices: needs them; a pair on two devices is refused (test_faults.py);
- test_can_load_older_state_dict: there is no older format; other versions are refused;
- test_load_nontensor_step, test_state_dict_with_cuda_params: the state is not torch's.
"""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing._internal import common_optimizers as harness
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import TestCase, parametrize

from pyctrlora import CTROptimizer, LoRALinear

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no LoRA pair among its:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*a parameter group holds no LoRA pair:UserWarning"),
]


def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
    kinds = {
        "default": {},
        "lr": {"lr": 0.05, "fallback_lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.05), "fallback_lr": torch.tensor(0.01)},
        "weight decay": {"fallback_lr": 0.01, "fallback_weight_decay": 0.1, "weight_decay": 0.1},
        "betas": {"fallback_lr": 0.01, "fallback_betas": (0.8, 0.9), "fallback_eps": 1e-6},
        "maximize": {"fallback_lr": 0.01, "maximize": True},
    }
    return [harness.OptimizerInput(params=None, kwargs=k, desc=d) for d, k in kinds.items()]


# Our errors say the same in our words.
OUR_WORDS = {
    "invalid param type": (TypeError, "expected an iterable of tensors or dicts; got one tensor"),
    "a param group cannot have duplicate parameters": (ValueError, "each parameter once"),
    "duplicate parameters should not occur across param groups either": (
        ValueError,
        "expected each parameter in one group",
    ),
    "Tensor lr must be 1-element": (ValueError, "lr = a tensor (2,)."),
    "all optimizer params should be with/without names": (
        ValueError,
        "expected names for all parameters or for none; got both",
    ),
}

INFO = harness.OptimizerInfo(
    CTROptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=harness.get_error_inputs_for_all_optims,
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    supports_sparse=False,
    supports_multiple_devices=False,
)
SCHEDULERS = [
    lambda opt: torch.optim.lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
    lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
    lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.9, total_iters=20),
]


class Problem:
    """Least squares over a pair, a weight and a bias."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.layer = LoRALinear(nn.Linear(10, 5, device=device, dtype=dtype), rank=2)
        self.layer.to(dtype)
        self.weight = nn.Parameter(torch.randn(5, 10, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(5, device=device, dtype=dtype))
        self.x = torch.randn(20, 10, device=device, dtype=dtype)
        self.y = torch.randn(20, 5, device=device, dtype=dtype)
        self.pair = [self.layer.lora_a, self.layer.lora_b]
        self.params = [*self.pair, self.weight, self.bias]

    def loss(self) -> Tensor:
        out = self.layer(self.x) + self.x @ self.weight.mT + self.bias
        return (out - self.y).square().mean()

    def functions(self) -> list[Tensor]:
        """What the model computes of its parameters, whatever the pair's gauge."""
        return [self.layer.lora_b @ self.layer.lora_a, self.weight, self.bias]

    def closure(self, opt: CTROptimizer) -> Any:
        def run() -> Tensor:
            opt.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return run


class TestCTROptimizer(TestCase):
    @harness.optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device, dtype):
            given = case.optimizer_error_input
            params = given.params or [nn.Parameter(torch.randn(2, device=device, dtype=dtype))]
            found = OUR_WORDS.get(given.desc, (case.error_type, case.error_regex))
            with pytest.raises(found[0], match=re.escape(found[1]) if given.desc in OUR_WORDS
                               else found[1]):  # fmt: skip
                optim_info.optim_cls(params, **given.kwargs)

    @parametrize("scheduled", [False, True])
    @harness.optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, scheduled):
        for case in optim_info.optim_inputs_func(device):
            for build in SCHEDULERS if scheduled else [None]:
                problem = Problem(device, dtype)
                opt = optim_info.optim_cls(problem.params, **copy.deepcopy(case.kwargs))
                schedule = build(opt) if build else None
                first = problem.loss().item()
                for _ in range(20):
                    value = opt.step(problem.closure(opt)).detach()
                    if schedule:
                        schedule.step(*([value] if "Plateau" in str(type(schedule)) else []))
                last = problem.loss().item()
                self.assertTrue(last > first if case.kwargs.get("maximize") else last < first)

    @harness.optims([INFO])
    def test_param_groups_lr(self, device, dtype, optim_info):
        problem = Problem(device, dtype)
        before = copy.deepcopy([p.data for p in problem.params])
        groups = [
            {"params": problem.pair, "lr": 0.1},
            {"params": [problem.weight], "fallback_lr": 0.01},
            {"params": [problem.bias]},
        ]
        opt = optim_info.optim_cls(groups, lr=0.0, fallback_lr=0.0)
        for _ in range(3):
            opt.step(problem.closure(opt))
        moved = [not torch.equal(p, x) for p, x in zip(problem.params, before, strict=True)]
        self.assertEqual(moved, [True, True, True, False])

    @harness.optims([INFO], dtypes=[torch.float64])
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        problem = Problem(device, dtype)
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        before = copy.deepcopy([p.data for p in problem.params])
        groups = [
            {"params": problem.pair, "weight_decay": 0.3},
            {"params": [problem.weight], "fallback_weight_decay": 0.2},
            {"params": [problem.bias]},
        ]
        optim_info.optim_cls(groups, lr=0.1, fallback_lr=0.1).step()
        scales = [0.97, 0.97, 0.98, 1.0]
        for p, old, scale in zip(problem.params, before, scales, strict=True):
            self.assertEqual(p.data, old * scale, atol=1e-12, rtol=0)

    @harness.optims([INFO])
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for case in optim_info.optim_inputs_func(device):
            problem = Problem(device, dtype)
            opt = optim_info.optim_cls(problem.params, **case.kwargs)
            before = copy.deepcopy([p.data for p in problem.params])
            opt.step()
            self.assertEqual([p.data for p in problem.params], before, atol=0, rtol=0)

    @harness.optims([INFO], dtypes=[torch.float64])
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for case in optim_info.optim_inputs_func(device):
            if "weight decay" in case.desc:
                continue  # decoupled: it shrinks whatever the gradient is, as in AdamW
            problem = Problem(device, dtype)
            opt = optim_info.optim_cls(problem.params, **case.kwargs)
            before = [t.detach().clone() for t in problem.functions()]
            for p in problem.params:
                p.grad = torch.zeros_like(p)
            opt.step()
            # Of the pair's product: its gauge may change.
            self.assertEqual([t.detach() for t in problem.functions()], before, atol=1e-12, rtol=0)

    @harness.optims([INFO])
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for case in optim_info.optim_inputs_func(device):
            opt = optim_info.optim_cls(Problem(device, dtype).params, **case.kwargs)
            self.assertIn("Parameter Group 1", repr(opt))

    @parametrize("named", [False, True])
    @harness.optims([INFO])
    def test_state_dict_deterministic(self, device, dtype, optim_info, named):
        for case in optim_info.optim_inputs_func(device):
            results = []
            for reload in (False, True):
                problem = Problem(device, dtype)
                members = list(zip("abwc", problem.params, strict=True))
                params: Any = members if named else problem.params
                opt = optim_info.optim_cls(params, **copy.deepcopy(case.kwargs))
                for step in range(6):
                    if reload and step == 3:
                        state = copy.deepcopy(opt.state_dict())
                        opt = optim_info.optim_cls(params, **copy.deepcopy(case.kwargs))
                        opt.load_state_dict(state)
                    opt.step(problem.closure(opt))
                results.append([p.data for p in problem.params])
            self.assertEqual(results[0], results[1], atol=0, rtol=0)

    @harness.optims([INFO])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for case in optim_info.optim_inputs_func(device):
            problem = Problem(device, dtype)
            opt = optim_info.optim_cls(problem.params, **case.kwargs)
            for _ in range(3):
                opt.step(problem.closure(opt))
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            self.assertEqual(torch.load(file, weights_only=True), opt.state_dict())

    @harness.optims([INFO])
    def test_step_pre_post_and_all_hooks(self, device, dtype, optim_info):
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )

        problem = Problem(device, dtype)
        opt = optim_info.optim_cls(problem.params)
        fired: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: fired.append("all before")),
            opt.register_step_pre_hook(lambda *_: fired.append("before")),
            opt.register_step_post_hook(lambda *_: fired.append("after")),
            register_optimizer_step_post_hook(lambda *_: fired.append("all after")),
        ]
        opt.step(problem.closure(opt))
        self.assertEqual(fired, ["all before", "before", "after", "all after"])
        for handle in handles:
            handle.remove()
        opt.step(problem.closure(opt))
        self.assertEqual(len(fired), 4)

    @harness.optims([INFO])
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        for case in optim_info.optim_inputs_func(device):
            problem = Problem(device, dtype)
            opt = optim_info.optim_cls(problem.params, **case.kwargs)
            opt.step(problem.closure(opt))
            copied = copy.deepcopy(opt)

            def public(of: CTROptimizer) -> set[str]:
                return {k for k in of.__dict__ if not k.startswith("_")}

            self.assertEqual(public(copied), public(opt))
            self.assertEqual(copied.state_dict(), opt.state_dict())

    @harness.optims([INFO])
    def test_flags_of_other_implementations_are_not_accepted(self, device, dtype, optim_info):
        for flag in ("foreach", "fused", "capturable", "differentiable"):
            with pytest.raises(
                TypeError, match=f"expected an option of EngineOptions; got '{flag}'"
            ):
                optim_info.optim_cls(Problem(device, dtype).params, **{flag: True})


with warnings.catch_warnings():
    instantiate_device_type_tests(TestCTROptimizer, globals(), only_for=("cpu",))
