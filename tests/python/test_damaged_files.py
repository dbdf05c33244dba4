"""States, checkpoints and adapters that were changed after they were written: each says what is
wrong and where, and nothing has changed. tests/fuzz looks for what is missing here."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pyctrlora import CTROptimizer, cg_init, checkpoint, prepare_for_resume, save_adapter

if TYPE_CHECKING:
    from collections.abc import Callable


def replace(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value at a path like "param_groups/0/lr"; removes what is there if it is `replace`."""

    def change(state: Any) -> None:
        *way, last = path.split("/")
        for part in way:
            state = state[int(part) if part.isdigit() else part]
        if value is replace:
            del state[last]
        else:
            state[last] = value

    return change


DAMAGES = {
    "state": (7, "expected a dict under 'state' in a saved state; got 7 of type int"),
    "param_groups": (None, "expected a list under 'param_groups' in a saved state; got None"),
    "ctrlora": ("x", "expected a dict under 'ctrlora' in a saved state; got 'x' of type str"),
    "ctrlora/tensors": ([], "expected a dict under 'tensors'"),
    "ctrlora/tensors/steps": (3, "expected a tensor under a name under 'tensors.'steps'"),
    "ctrlora/version": (torch.ones(2), r"version 1; got a tensor \(2,\) of type Tensor"),
    "param_groups/0/params": (None, "expected a list under 'params'"),
    "param_groups/0/kind": (None, r"expected saved groups .* got \[\(None, "),
    "param_groups/0/lr": (-1.0, r"lr = -1\.0\. Violated constraint: lr >= 0"),
    "param_groups/0/weight_decay": ("big", "expected weight_decay as a number; got 'big' of type"),
    "param_groups/0/first_lr": (replace, r"got \"none of \['first_lr'\]\""),
    "param_groups/1/betas": ((0.9,), r"expected betas as two numbers; got \(0\.9,\) of type tuple"),
    "param_groups/1/eps": (math.nan, "eps = nan. Violated constraint: eps >= 0"),
}


@pytest.mark.parametrize("path", DAMAGES)
def test_a_damaged_state_is_refused_whole(net, batches, train, state, same, path):
    model = net("own")
    model.third.base.requires_grad_(True)
    opt = CTROptimizer(model.parameters())
    train(model, opt, batches(2))
    saved, before = copy.deepcopy(opt.state_dict()), state(opt)
    value, message = DAMAGES[path]
    replace(path, value)(saved)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(saved)
    same(state(opt), before)
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_changed_bit_of_a_checkpoint_is_seen(net, tmp_path, share):
    model = net("own", dtype=torch.float32, rank=4)
    opt = CTROptimizer(model.parameters())
    file = tmp_path / "run.pt"
    torch.serialization.set_crc32_options(False)  # somebody else's wish: not for our files
    try:
        checkpoint.save(file, model=model, optimizer=opt, step=1)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint.load(file, model=model, optimizer=opt)
    content = bytearray(file.read_bytes())
    numbers = content.index(model.second.lora_b.detach().numpy().tobytes())
    content[numbers + int(share * model.second.lora_b.nbytes)] ^= 1
    file.write_bytes(content)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"expected '.*run\.pt' to be a whole checkpoint; got"):
        checkpoint.load(file, model=model, optimizer=opt)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


CONFIGS = {
    "no JSON": ("{", "expected JSON in '.*adapter_config.json'"),
    "no object": ("[]", "expected an object in '.*'; got list"),
    "no alpha": ("{}", "expected numbers as lora_alpha in '.*'; got None"),
    "alpha": ('{"lora_alpha": 1e308}', r"expected lora_alpha below 1e\+06 in '.*'; got 1e\+308"),
    "patterns": ('{"lora_alpha": 1, "alpha_pattern": [1]}', "under 'alpha_pattern' in '.*'; got l"),
    "expression": ('{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', "expected regular expressions"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_damaged_adapter_config_is_named(net, tmp_path, config):
    model = net("own")
    save_adapter(model, tmp_path)
    text, message = CONFIGS[config]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare_for_resume(model, tmp_path)


def test_damaged_weights_are_named(net, tmp_path):
    save_adapter(net("own"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected a whole safetensors file in '.*'; got"):
        prepare_for_resume(net("own"), tmp_path)


def test_statistics_that_give_no_finite_start_are_refused(net, batches, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    (x, y), *_ = batches(1, size=16, dtype=torch.float32)
    model, cache = net("own", dtype=torch.float32), tmp_path / "cache"

    def init() -> None:
        cg_init(
            model, lambda: (model(x) - y).square().mean().backward(), cache=cache, progress=False
        )

    init()
    tensors = safetensors.load_file(cache)
    with safetensors.safe_open(cache, framework="pt") as file:
        described = file.metadata()
    tensors["group0.base_square"] *= 1e200  # a possible number, which no float32 start can meet
    safetensors.save_file(tensors, cache, metadata=described)
    with pytest.raises(ValueError, match="expected statistics that give finite start values"):
        init()
