"""`basis_dtype="bfloat16"`: less state than AdamW's, and the same training."""

from __future__ import annotations

import copy

import pytest
import torch

from pyctrlora import CTROptimizer, add_lora


def test_the_same_training_within_rounding(net, batches, train):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = net("own", dtype=torch.float32)
        opt = CTROptimizer(model.parameters(), lr=0.05, sketch_rank=4, basis_dtype=dtype)
        losses[dtype] = train(model, opt, batches(1, dtype=torch.float32) * 12)
    wide, narrow = losses["float32"], losses["bfloat16"]
    assert narrow != wide
    assert narrow[-1] < 0.85 * narrow[0]
    assert narrow[-1] == pytest.approx(wide[-1], rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0.98, 1.04), ("bfloat16", 0.7, 1.0)]
)
def test_state_beside_adamws(dtype, least, most):
    torch.manual_seed(0)
    width, rank = 2048, 16
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(2)))
    add_lora(model, rank=rank, targets=["0", "1"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    opt = CTROptimizer(parameters, sketch_rank=rank, basis_dtype=dtype)
    adamw = 2 * sum(p.nbytes for p in parameters)
    assert least < opt.metrics()["state_bytes"] / adamw <= most


def test_resumes_bit_for_bit_and_reads_the_other_kind(net, batches, train, trained, same):
    data = batches(8, dtype=torch.float32)

    def fresh(dtype):
        model = net("own", dtype=torch.float32)
        return model, CTROptimizer(model.parameters(), lr=0.05, sketch_rank=4, basis_dtype=dtype)

    model, opt = fresh("bfloat16")
    train(model, opt, data[:5])
    parameters, saved = trained(model), copy.deepcopy(opt.state_dict())
    kept = [t.dtype for name, t in saved["ctrlora"]["tensors"].items() if name.endswith("basis")]
    assert kept
    assert set(kept) == {torch.bfloat16}
    train(model, opt, data[5:])
    expected = trained(model)
    for dtype in ("bfloat16", "float32"):
        twin, its = fresh(dtype)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name in parameters:
                    parameter.copy_(parameters[name])
        its.load_state_dict(saved)
        train(twin, its, data[5:])
        if dtype == "bfloat16":
            same(trained(twin), expected)
        else:
            same(trained(twin), expected, rtol=1e-2)


def test_unknown_type_is_refused(net):
    with pytest.raises(ValueError, match=r"basis_dtype = float16\. Violated constraint"):
        CTROptimizer(net("own").parameters(), basis_dtype="float16")  # type: ignore[arg-type]
